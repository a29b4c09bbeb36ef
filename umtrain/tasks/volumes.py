"""CT volumes with one label each.

# Note: [3D convolutions in bf16]
On processors with AVX512-BF16 or AMX, torch 2.15 (oneDNN) gives wrong results for some 3D
convolutions in bf16: pytorch/pytorch issue 169688, and here, where weight gradients of ResNet-18
held values of 1e19 and more in a third of the steps, until the loss was not a number. In fp32 they
are right. So volumes train in fp32 unless told otherwise, and bf16 on a processor is refused.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from umtrain.config import RunConfig
from umtrain.data.manifest import Manifest, Split, Volume
from umtrain.data.volume_augment import VolumeAugment
from umtrain.data.volume_dataset import VolumeDataset
from umtrain.data.volume_grid import Grid, HounsfieldWindow
from umtrain.tasks.base import Batch
from umtrain.tasks.classification import ClassificationTask

# The window's lower end, air, is 0, which is what padding looks like too; its upper end is this.
_WHITE = 4.0
_MOST_GREY = 2**16 - 1


class VolumeTask(ClassificationTask):
    """Positive against negative CT volumes."""

    in_channels: ClassVar[int] = 1

    def __init__(self, config: RunConfig, manifest: Manifest[Volume]) -> None:
        super().__init__(config, manifest)
        self.volumes = manifest

    @property
    def bf16_fault_of_processors(self) -> str:
        """3D convolutions are wrong."""
        return "3D convolutions in bf16 are wrong on processors in this torch"

    @property
    def data_facts(self) -> dict[str, Any]:
        """Which label is positive, and what of a volume the network sees."""
        chosen = self.config.dataset
        assert chosen.window_center is not None
        assert chosen.window_width is not None
        low = chosen.window_center - chosen.window_width / 2
        grid = " × ".join(str(n) for n in self.input_shape)
        at = f" at {chosen.spacing_mm:g} mm" if chosen.spacing_mm else ""
        window = f"{low:g} to {low + chosen.window_width:g} HU"
        return {**super().data_facts, "grid": f"{grid} voxels{at}", "window": window}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Slices, rows and columns: the dataset's depth, res, and res by the dataset's aspect."""
        chosen = self.config.dataset
        assert chosen.depth is not None
        return chosen.depth, self.config.res, max(1, round(self.config.res * chosen.aspect))

    def dataset(self, split: Split, training: bool) -> VolumeDataset:
        """Return volumes as uint16 (1, depth, rows, columns)."""
        chosen = self.config.dataset
        assert chosen.window_center is not None
        assert chosen.window_width is not None
        depth, rows, columns = self.input_shape
        return VolumeDataset(
            self.volumes.split(split),
            self.labels,
            Grid(depth, rows, columns, chosen.spacing_mm),
            HounsfieldWindow(chosen.window_center, chosen.window_width),
            augment=VolumeAugment() if training and chosen.augment else None,
            seed=self.config.seed,
        )

    def inputs(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return (n, 1, depth, rows, columns): air 0, the window's upper end 4."""
        image = batch["image"].to(device, non_blocking=True).to(torch.float32)
        image.mul_(_WHITE / _MOST_GREY)
        scaled: Tensor = image.to(dtype, memory_format=torch.channels_last_3d)
        return scaled
