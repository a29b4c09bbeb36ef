"""The interface between the runner and a kind of dataset."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from umtrain import models
from umtrain.config import RunConfig
from umtrain.data.isolated import READ_LIMITS, Limits
from umtrain.data.loader import Batch, ImageDataset, Loader, make_loader
from umtrain.data.manifest import Manifest, Radiograph, Slide, Split, Volume
from umtrain.data.share import WHOLE, Share
from umtrain.data.skipped import Skipped
from umtrain.models.norm import set_eval_statistics

Row = dict[str, Any]
AnyManifest = Manifest[Slide] | Manifest[Radiograph] | Manifest[Volume]

__all__ = ["AnyManifest", "Batch", "Row", "Task"]


class Task(ABC):
    """One kind of dataset: how its batches become a loss, predictions and metrics.

    `fields` are the columns of predictions.csv; `headline` is the metric that names the best
    epoch, with `higher_is_better` for its direction. `skipped` are the images that loaders leave
    out.
    """

    in_channels: ClassVar[int]
    fields: ClassVar[tuple[str, ...]]
    headline: ClassVar[str]
    higher_is_better: ClassVar[bool]
    # Whether `inputs` works pixel by pixel: of some rows, it gives those rows of the whole.
    inputs_by_pixel: ClassVar[bool] = False

    def __init__(self, config: RunConfig, manifest: AnyManifest) -> None:
        self.config = config
        self.manifest = manifest
        self.skipped = Skipped(manifest.records, config.dataset.max_bad_fraction)

    @classmethod
    def without_images(cls, config: RunConfig) -> Self:
        """Return a task that knows its network and that network's input, and nothing else."""
        task = cls.__new__(cls)
        task.config = config
        return task

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """Channels that the network puts out."""

    @abstractmethod
    def dataset(self, split: Split, training: bool) -> ImageDataset:
        """Return the images of `split`, augmented when `training` and the config asks for it."""

    def loader(self, split: Split, training: bool, share: Share = WHOLE) -> Loader:
        """Return batches of `split`: shuffled and augmented when `training`, else in order.

        Of several processes each reads its `share` of every batch.
        """
        return make_loader(
            self.dataset(split, training),
            self.config.batch_size,
            shuffle=training,
            seed=self.config.seed,
            workers=self.config.dataset.workers,
            share=share,
            limits=self.limits,
            skipped=self.skipped,
        )

    @property
    def limits(self) -> Limits:
        """What reading one image may cost."""
        return Limits(self.config.dataset.read_timeout_s, READ_LIMITS.memory_bytes)

    @abstractmethod
    def inputs(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the network's normalised input: channels-last (n, in_channels, *input_shape)."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the scalar fp32 loss of the network's `outputs` for `batch`."""

    @abstractmethod
    def predictions(self, outputs: Tensor, batch: Batch, split: str) -> list[Row]:
        """Return one row of predictions.csv for each image of `batch`."""

    @abstractmethod
    def metrics(self, rows: list[Row]) -> dict[str, Any]:
        """Return the figures of merit of `rows` that are had quickly: those of each epoch."""

    @abstractmethod
    def evidence(self, rows: list[Row], validation: dict[str, Any] | None) -> dict[str, Any]:
        """Return the figures of merit of `rows`, of one split, as the record's section holds them.

        `validation` is the record's section of the validation split, which a test split's
        figures may depend on; None if there is none, and for the validation split itself.
        """

    def patients(self, rows: list[Row]) -> list[str]:
        """Return the patient of each row, by the manifest; never part of a record or a report."""
        patient_of = {record.id: record.patient_id for record in self.manifest.records}
        return [patient_of[row["id"]] for row in rows]

    @property
    @abstractmethod
    def data_facts(self) -> dict[str, Any]:
        """Choices made about the data that a reader of the figures must know."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Rows and columns of the network's input; of volumes slices first."""

    @property
    def bf16_fault_of_processors(self) -> str | None:
        """Why a processor's results for this network and input are wrong in bf16; None: right."""
        columns, stride = self.input_shape[-1], models.total_stride(self.config.model.name)
        if columns > stride:
            return None
        # Note: [One column in bf16] in umtrain/models/__init__.py
        return (
            f"on processors torch's convolutions in bf16 give wrong numbers for maps of one "
            f"column, and {self.config.model.name} makes such a map of {columns} columns "
            f"(more than {stride} are needed)"
        )

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels-last, of images or of volumes: how inputs and weights lie."""
        return torch.channels_last if len(self.input_shape) == 2 else torch.channels_last_3d

    def sample_input(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return an input as a training batch has it: same shape, dtype and strides, no content."""
        shape = (self.config.batch_size, self.in_channels, *self.input_shape)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=self.memory_format)

    def create_model(self, pretrained: Path | None = None) -> nn.Module:
        """Return the configured network in channels-last format, seeded by the caller.

        Its weights are new ones, or those that the file `pretrained` has for it.
        """
        chosen = self.config.model
        model = models.create(
            chosen.name,
            in_channels=self.in_channels,
            n_outputs=self.n_outputs,
            norm=chosen.norm,
            pool=chosen.pool,
            pretrained=pretrained,
        )
        # Note: [Batch size 1] in umtrain/models/norm.py
        is_alone = self.config.batch_size == 1 and not chosen.sync_batchnorm
        set_eval_statistics(model, "image" if is_alone else "running")
        return model.to(memory_format=self.memory_format)

    def score(self, metrics: dict[str, Any], loss: float) -> tuple[float, float]:
        """Return how good a validation was, larger is better; a smaller loss breaks ties."""
        value = metrics.get(self.headline)
        if value is None:
            return (float("-inf"), -loss)
        return (value if self.higher_is_better else -value, -loss)
