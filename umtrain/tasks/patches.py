"""Patches of slides, drawn by masks: three logits, weighted cross-entropy, AUC one against rest."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from umtrain.config import RunConfig
from umtrain.data.augment import SlideAugment
from umtrain.data.manifest import Manifest, Slide, Split
from umtrain.data.masks import CLASSES
from umtrain.data.patches import PatchDataset
from umtrain.evaluation.classification import roc_auc
from umtrain.tasks.base import Batch, Row
from umtrain.tasks.slides import SlideTask


class PatchTask(SlideTask):
    """What the network of approach=two_stage is trained on: background, benign or cancer.

    `slides` is the manifest as it is; `manifest` has a row for each patch that an epoch draws, and
    for validation only the slides that have a mask.
    """

    fields: ClassVar[tuple[str, ...]] = ("id", "split", "label", *CLASSES)
    headline: ClassVar[str] = "patch_auc"

    def __init__(self, config: RunConfig, slides: Manifest[Slide]) -> None:
        super().__init__(config, slides)
        assert config.dataset.patches_per_slide is not None
        self.per_slide = config.dataset.patches_per_slide
        drawn = [slide for slide in slides.records if slide.split == "train" or slide.mask]
        patches = tuple(slide for slide in drawn for _ in range(self.per_slide))
        self.manifest = dataclasses.replace(slides, records=patches)
        self._class_weights = _class_weights(
            [self.labels[slide.label] for slide in slides.split("train")],
            config.optim.class_weights,
        )

    @property
    def n_outputs(self) -> int:
        """One logit for each class of patches."""
        return len(CLASSES)

    def dataset(self, split: Split, training: bool) -> PatchDataset:
        """Return patches as uint8 (3, res, res), drawn by the masks of `split`."""
        chosen = self.config.dataset
        return PatchDataset(
            [slide for slide in self.slides.split(split) if split == "train" or slide.mask],
            self.config.res,
            per_slide=self.per_slide,
            mpp=chosen.mpp,
            augment=SlideAugment() if training and chosen.augment else None,
            seed=self.config.seed,
        )

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy, each class weighted by its rarity among the patches drawn."""
        labels = batch["label"].to(outputs.device)
        weights = self._class_weights.to(outputs.device)
        losses = functional.cross_entropy(outputs.float(), labels, weights, reduction="none")
        return losses.mean()

    def predictions(self, outputs: Tensor, batch: Batch, split: str) -> list[Row]:
        """Return id of the slide, split, class and the probability of each class, of each patch."""
        probs = outputs.float().softmax(dim=1).tolist()
        return [
            {
                "id": slide_id,
                "split": split,
                "label": label,
                **dict(zip(CLASSES, row, strict=True)),
            }
            for slide_id, label, row in zip(
                batch["id"], batch["label"].tolist(), probs, strict=True
            )
        ]

    def metrics(self, rows: list[Row]) -> dict[str, Any]:
        """Return the accuracy, and the AUC of each class against the rest, averaged.

        Classes that do not occur, or that nothing but occurs of, have no AUC.
        """
        labels = np.array([row["label"] for row in rows])
        probs = np.array([[row[name] for name in CLASSES] for row in rows])
        accuracy = float((probs.argmax(axis=1) == labels).mean())
        occurring = [number for number in range(len(CLASSES)) if 0 < (labels == number).mean() < 1]
        if not occurring:
            reason = "AUC needs two classes of patches; the split has one"
            return {"patch_auc": None, "patch_auc_reason": reason, "patch_accuracy": accuracy}
        aucs = [roc_auc(labels == number, probs[:, number]).auc for number in occurring]
        return {"patch_auc": float(np.mean(aucs)), "patch_accuracy": accuracy}


def _class_weights(train: list[int], scheme: str) -> Tensor:
    """Return the weight of each class: its rarity if all slides have what their labels promise.

    A negative slide's patches are background and benign in turn, a positive one's cancer too.
    """
    if scheme == "none":
        return torch.ones(len(CLASSES))
    positive = sum(train) / len(train)
    other = positive / 3 + (1 - positive) / 2
    shares = torch.tensor([other, other, positive / 3])
    return 1 / (len(CLASSES) * shares)
