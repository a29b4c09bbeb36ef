"""Whole slides with one label each."""

from typing import ClassVar

import torch
from torch import Tensor

from umtrain.config import RunConfig
from umtrain.data.augment import SlideAugment
from umtrain.data.dataset import SlideDataset
from umtrain.data.manifest import Manifest, Slide, Split
from umtrain.tasks.base import Batch
from umtrain.tasks.classification import ClassificationTask

# Grey levels become (level - shift) * scale. From scratch, white, a slide's background, becomes
# zero and tissue positive: zero padding then looks like background. Weights from elsewhere expect
# what they were trained with: ImageNet's mean and deviation per channel, as in torchvision.
_FROM_SCRATCH = (torch.full((3, 1, 1), 255.0), torch.full((3, 1, 1), -1 / 64))
_IMAGENET = (
    255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
    1 / (255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)),
)


class SlideTask(ClassificationTask):
    """Positive against negative slides."""

    in_channels: ClassVar[int] = 3

    def __init__(self, config: RunConfig, manifest: Manifest[Slide]) -> None:
        super().__init__(config, manifest)
        self.slides = manifest

    @property
    def input_shape(self) -> tuple[int, int]:
        """A square of res."""
        return self.config.res, self.config.res

    def dataset(self, split: Split, training: bool) -> SlideDataset:
        """Return slides as uint8 (3, res, res)."""
        chosen = self.config.dataset
        return SlideDataset(
            self.slides.split(split),
            self.labels,
            res=self.config.res,
            fit=chosen.fit,
            mpp=chosen.mpp,
            augment=SlideAugment() if training and chosen.augment else None,
            seed=self.config.seed,
        )

    def inputs(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return (n, 3, res, res): white 0, black 4; pretrained: ImageNet's scale."""
        image = batch["image"].to(device, non_blocking=True)
        values: Tensor = image.to(dtype, memory_format=torch.channels_last)
        shift, scale = _IMAGENET if self.config.model.pretrained else _FROM_SCRATCH
        return values.sub_(shift.to(values)).mul_(scale.to(values))
