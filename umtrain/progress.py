"""Where training stands: the steps so far, and what the validations said."""

import contextlib
import csv
import io
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch

from umtrain.errors import RunError
from umtrain.files import write_text
from umtrain.report.record import Record, throughput

WARMUP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer update, a line of steps.csv; none, its loss not a number, without an image."""

    step: int
    epoch: int
    loss: float
    lr: float
    images: int
    step_s: float
    data_wait_s: float


@dataclass
class Progress:
    """Where training stands.

    `epochs` counts those that are over, validation included. `best_steps` are the steps after
    which a validation was the best so far; `resumed_after` those that a session went on after.
    `left_out` are the steps without an update (on_nan=skip): {step, images, loss}.
    """

    steps: list[Step] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    epochs: int = 0
    best: tuple[float, float] | None = None
    best_epoch: int | None = None
    best_steps: list[int] = field(default_factory=list)
    resumed_after: list[int] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return it as tensors and plain values."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        rows = [list(asdict(step).values()) for step in self.steps]
        values["steps"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(fields(Step)))
        return values

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """Return what `state` was taken of."""
        whole = [item.type is int for item in fields(Step)]
        rows = state["steps"].tolist()
        steps = [
            Step(*(int(v) if is_int else v for v, is_int in zip(row, whole, strict=True)))
            for row in rows
        ]
        return cls(**{**state, "steps": steps})

    def train_figures(self) -> Record:
        """Return the record's train section."""
        losses = [step.loss for step in self.steps if math.isfinite(step.loss)]
        return {
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "steps": len(self.steps),
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "validations": self.validations,
            "resumed_after_steps": self.resumed_after,
            "steps_left_out": self.left_out,
        }

    def throughput(self) -> Record:
        """Return the record's throughput section, warm-up steps of each session left out."""
        starts = (0, *self.resumed_after)
        warmup = {start + number for start in starts for number in range(1, WARMUP_STEPS + 1)}
        timed = [step for step in self.steps if step.step not in warmup and step.images]
        figures = throughput([step.step_s for step in timed], [step.images for step in timed])
        return {
            **figures,
            "warmup_steps": sum(step.step in warmup for step in self.steps),
            "data_wait_s": sum(step.data_wait_s for step in timed),
        }

    def epoch_loss(self, epoch: int) -> float:
        """Return the mean loss of an epoch's steps; not a number if none has any."""
        losses = [s.loss for s in self.steps if s.epoch == epoch and math.isfinite(s.loss)]
        return sum(losses) / len(losses) if losses else math.nan


class StepLog(contextlib.AbstractContextManager["StepLog"]):
    """steps.csv: `steps`, which were before, and a line as each further step ends.

    Raises RunError if the disk does not take it.
    """

    def __init__(self, path: Path, steps: list[Step]) -> None:
        self._path, self._before = path, steps
        self._stream: IO[str] | None = None

    def __enter__(self) -> "StepLog":
        # What a killed session wrote after its last checkpoint goes, and what is torn.
        text = io.StringIO()
        writer = _writer(text)
        writer.writeheader()
        writer.writerows(map(asdict, self._before))
        write_text(self._path, text.getvalue())
        self._stream = self._path.open("a", newline="", encoding="utf-8")
        return self

    def write(self, step: Step) -> None:
        """Add a line."""
        assert self._stream is not None
        try:
            _writer(self._stream).writerow(asdict(step))
            self._stream.flush()
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be written ({error.strerror}); free some of that disk, then "
                "start the run again: it goes on from its last checkpoint"
            ) from error

    def __exit__(self, *_: object) -> None:
        assert self._stream is not None
        # A line that the disk did not take is still held, and fails again here.
        with contextlib.suppress(OSError):
            self._stream.close()


def _writer(stream: Any) -> "csv.DictWriter[str]":
    return csv.DictWriter(stream, [item.name for item in fields(Step)])
