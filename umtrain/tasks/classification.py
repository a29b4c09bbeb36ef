"""Images with one label each: one logit, weighted binary cross-entropy, AUC."""

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from umtrain.config import RunConfig
from umtrain.data.labels import LabelledManifest, binary_labels
from umtrain.evaluation.classification import classification_evidence, classification_metrics
from umtrain.evaluation.operating_point import choose_threshold
from umtrain.tasks.base import Batch, Row, Task

_DEFAULT_THRESHOLD = 0.5
_FROM_VALIDATION = "chosen on the validation split"
_FROM_THIS_SPLIT = "the largest Youden index of this split, which flatters it"
_FROM_ONE_CLASS = "0.5, as this split has one class only and nothing to choose by"
_FROM_NOTHING = "0.5, as none was chosen on a validation split"


class ClassificationTask(Task):
    """Positive against negative images; what kind of images is for a subclass to say."""

    fields: ClassVar[tuple[str, ...]] = ("id", "split", "label", "prob")
    headline: ClassVar[str] = "auc"
    higher_is_better: ClassVar[bool] = True
    inputs_by_pixel: ClassVar[bool] = True

    def __init__(self, config: RunConfig, manifest: LabelledManifest) -> None:
        super().__init__(config, manifest)
        self.labels = binary_labels(manifest, config.dataset.positive)
        train = [self.labels[record.label] for record in manifest.split("train")]
        self._positive_weight, self._negative_weight = _class_weights(
            train, config.optim.class_weights
        )

    @property
    def n_outputs(self) -> int:
        """One logit, of the positive class."""
        return 1

    @property
    def data_facts(self) -> dict[str, Any]:
        """Which label counts as positive."""
        return {"positive": next(label for label, number in self.labels.items() if number)}

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return binary cross-entropy, each class weighted by its rarity in training."""
        logits = outputs.float().squeeze(1)
        labels = batch["label"].to(logits)
        weights = torch.where(labels > 0, self._positive_weight, self._negative_weight)
        return functional.binary_cross_entropy_with_logits(logits, labels, weights)

    def predictions(self, outputs: Tensor, batch: Batch, split: str) -> list[Row]:
        """Return id, split, label and the positive class's probability of each image."""
        probabilities = outputs.float().squeeze(1).sigmoid().tolist()
        return [
            {"id": image_id, "split": split, "label": int(label), "prob": prob}
            for image_id, label, prob in zip(
                batch["id"], batch["label"].tolist(), probabilities, strict=True
            )
        ]

    def metrics(self, rows: list[Row]) -> dict[str, Any]:
        """Return AUC with its interval, and accuracy."""
        return classification_metrics(*_labels_and_probs(rows))

    def evidence(self, rows: list[Row], validation: dict[str, Any] | None) -> dict[str, Any]:
        """Return `classification_evidence` at the threshold that the validation split chose.

        That split itself is judged at its own best threshold, others at the one that
        `validation` has, or else at 0.5; `threshold_from` says which.
        """
        labels, probs = _labels_and_probs(rows)
        threshold, source = _threshold(labels, probs, _split_of(rows), validation)
        return classification_evidence(labels, probs, self.patients(rows), threshold, source)


def _labels_and_probs(rows: list[Row]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    return labels, np.array([row["prob"] for row in rows], dtype=np.float64)


def _split_of(rows: list[Row]) -> str | None:
    splits = {row["split"] for row in rows}
    assert len(splits) <= 1, f"rows of one split expected, got {sorted(splits)}"
    return next(iter(splits), None)


def _threshold(
    labels: NDArray[np.int64],
    probs: NDArray[np.float64],
    split: str | None,
    validation: dict[str, Any] | None,
) -> tuple[float, str]:
    """Return the threshold for a split, and words for where it comes from."""
    if split == "val":
        chosen = choose_threshold(labels, probs)
        if chosen is None:
            return _DEFAULT_THRESHOLD, _FROM_ONE_CLASS
        return chosen, _FROM_THIS_SPLIT
    # A validation split of one class has a threshold too, but one that nothing speaks for.
    chosen = None if validation is None else validation.get("threshold")
    if validation and chosen is not None and validation["n_pos"] and validation["n_neg"]:
        return float(chosen), _FROM_VALIDATION
    return _DEFAULT_THRESHOLD, _FROM_NOTHING


def _class_weights(labels: list[int], scheme: str) -> tuple[float, float]:
    if scheme == "none":
        return 1.0, 1.0
    positives = sum(labels)
    negatives = len(labels) - positives
    return len(labels) / (2 * positives), len(labels) / (2 * negatives)
