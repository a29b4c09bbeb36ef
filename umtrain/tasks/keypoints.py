"""Lateral spine radiographs with the two keypoints of the SVA: heatmaps, error in mm."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from umtrain.config import RunConfig
from umtrain.data.augment import RadiographAugment
from umtrain.data.dataset import RadiographDataset
from umtrain.data.frame import network_width_px
from umtrain.data.manifest import Manifest, Radiograph, Split
from umtrain.evaluation.keypoints import Floats, keypoint_evidence, keypoint_metrics, sva_mm
from umtrain.models.heatmap import KeypointLoss, decode
from umtrain.models.resunet35 import HEATMAP_STRIDE
from umtrain.tasks.base import Batch, Row, Task

_NAMES = ("c7", "s1")


class KeypointTask(Task):
    """Centre of C7 and posterior superior corner of S1."""

    in_channels: ClassVar[int] = 1
    fields: ClassVar[tuple[str, ...]] = (
        "id",
        "split",
        *(f"{name}_{axis}_{kind}" for kind in ("true", "pred") for name in _NAMES for axis in "xy"),
        "sva_true_mm",
        "sva_pred_mm",
        "mm_per_px",
        "row_mm_per_px",
        "facing",
    )
    headline: ClassVar[str] = "mae_mm"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, config: RunConfig, manifest: Manifest[Radiograph]) -> None:
        super().__init__(config, manifest)
        self.radiographs = manifest
        self._criterion = KeypointLoss(HEATMAP_STRIDE)

    @property
    def n_outputs(self) -> int:
        """One heatmap for each keypoint."""
        return len(_NAMES)

    @property
    def data_facts(self) -> dict[str, Any]:
        """How many images do not say which way the patient faces; they count as facing right."""
        unstated = sum(image.facing is None for image in self.radiographs.records)
        return {"n_facing_unstated": unstated}

    @property
    def input_shape(self) -> tuple[int, int]:
        """The network's frame: res rows, and columns by the dataset's aspect."""
        return self.config.res, network_width_px(self.config.res, self.config.dataset.aspect)

    def dataset(self, split: Split, training: bool) -> RadiographDataset:
        """Return radiographs as uint16 (1, rows, columns) with keypoints in that frame."""
        return RadiographDataset(
            self.radiographs.split(split),
            self.config.res,
            aspect=self.config.dataset.aspect,
            augment=RadiographAugment() if training and self.config.dataset.augment else None,
            seed=self.config.seed,
        )

    def inputs(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return (n, 1, rows, columns), each image with zero mean and unit deviation."""
        image = batch["image"].to(device, non_blocking=True).to(torch.float32)
        deviation, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        normalised: Tensor = image.sub_(mean).div_(deviation.clamp_(min=1.0))
        return normalised.to(dtype, memory_format=torch.channels_last)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the divergence of the heatmaps from Gaussians on the keypoints."""
        loss: Tensor = self._criterion(outputs, batch["keypoints"].to(outputs.device))
        return loss

    def predictions(self, outputs: Tensor, batch: Batch, split: str) -> list[Row]:
        """Return keypoints in pixels of the stored image, and the SVA in mm, true and predicted."""
        found = decode(outputs, HEATMAP_STRIDE).cpu()
        true, predicted = (_stored(xy, batch) for xy in (batch["keypoints"], found))
        spacing_mm = batch["spacing_mm"].numpy()
        facing = ["right" if sign > 0 else "left" for sign in batch["facing"].tolist()]
        true_mm, predicted_mm = (
            sva_mm(xy[:, 0], xy[:, 1], spacing_mm[:, 1], facing) for xy in (true, predicted)
        )
        return [
            {
                "id": image_id,
                "split": split,
                **_flat(true[i], "true"),
                **_flat(predicted[i], "pred"),
                "sva_true_mm": float(true_mm[i]),
                "sva_pred_mm": float(predicted_mm[i]),
                "mm_per_px": float(spacing_mm[i, 1]),
                "row_mm_per_px": float(spacing_mm[i, 0]),
                "facing": facing[i],
            }
            for i, image_id in enumerate(batch["id"])
        ]

    def metrics(self, rows: list[Row]) -> dict[str, Any]:
        """Return SVA errors and radial errors in mm."""
        return keypoint_metrics(*_measurements(rows))

    def evidence(self, rows: list[Row], validation: dict[str, Any] | None) -> dict[str, Any]:
        """Return `keypoint_evidence`; nothing in it depends on `validation`."""
        return keypoint_evidence(*_measurements(rows), self.patients(rows))


def _measurements(rows: list[Row]) -> tuple[Floats, Floats, Floats, list[str]]:
    """Return true and predicted keypoints (n, 2, 2), spacings (n, 2), and sides (n,)."""
    true, predicted = (
        np.array(
            [[[row[f"{name}_{axis}_{kind}"] for axis in "xy"] for name in _NAMES] for row in rows]
        )
        for kind in ("true", "pred")
    )
    spacing_mm = np.array([[row["row_mm_per_px"], row["mm_per_px"]] for row in rows])
    return true, predicted, spacing_mm, [row["facing"] for row in rows]


def _stored(xy: Tensor, batch: Batch) -> Floats:
    """Map (n, 2, 2) points from the network's frame to pixels of the stored image."""
    to_stored = batch["to_stored"]  # (n, 2, 3): linear part and offset
    points = torch.einsum("nij,nkj->nki", to_stored[:, :, :2], xy.double())
    stored: Floats = (points + to_stored[:, None, :, 2]).numpy()
    return stored


def _flat(points: Floats, kind: str) -> dict[str, float]:
    return {
        f"{name}_{axis}_{kind}": float(points[i, j])
        for i, name in enumerate(_NAMES)
        for j, axis in enumerate("xy")
    }
