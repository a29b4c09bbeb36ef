"""What a run tells a dashboard while it trains: nothing, or TensorBoard (`logger=tensorboard`)."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from umtrain.errors import ConfigError

FOLDER = "tensorboard"


class RunLogger:
    """Tells nobody; the base of those that do. `folder` is theirs, None if they have none."""

    folder: Path | None = None

    def step(self, number: int, scalars: dict[str, float]) -> None:
        """Take note of the figures of a training step, by name."""

    def validation(
        self, number: int, scalars: dict[str, float | None], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Take note of a validation after a step: its figures, and its rows of predictions."""

    def pictures(self, number: int, paths: Iterable[Path]) -> None:
        """Take note of PNG files that were drawn after a step."""

    def close(self) -> None:
        """Write out what is held."""


class TensorBoardLogger(RunLogger):
    """Writes event files into `folder`; look at them with `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        # What was told of later steps before a kill is not shown.
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def step(self, number: int, scalars: dict[str, float]) -> None:
        """See `RunLogger`."""
        for name, value in scalars.items():
            self._writer.add_scalar(f"train/{name}", value, number)

    def validation(
        self, number: int, scalars: dict[str, float | None], rows: Sequence[dict[str, Any]]
    ) -> None:
        """See `RunLogger`; with a precision-recall curve, or the errors of SVA, of its rows."""
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(f"val/{name}", value, number)
        if rows and "prob" in rows[0]:
            labels, probs = (np.array([float(row[key]) for row in rows]) for key in _SLIDE_KEYS)
            self._writer.add_pr_curve("val/precision and recall", labels, probs, number)
        elif rows and "sva_pred_mm" in rows[0]:
            errors_mm = np.array([row["sva_pred_mm"] - row["sva_true_mm"] for row in rows])
            self._writer.add_histogram("val/error of SVA, mm", errors_mm, number)
        self._writer.flush()

    def pictures(self, number: int, paths: Iterable[Path]) -> None:
        """See `RunLogger`."""
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            name = f"{path.parent.name}/{path.stem}" if path.parent.name == "cases" else path.stem
            self._writer.add_image(name, pixels, number, dataformats="HWC")

    def close(self) -> None:
        """See `RunLogger`."""
        self._writer.close()


_SLIDE_KEYS = ("label", "prob")


def check_logger(name: str) -> None:
    """Raise ConfigError if the logger needs a package that is not installed."""
    if name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logger=tensorboard needs a package that is not installed; "
            "pip install 'umtrain[tensorboard]'"
        )


def create_logger(name: str, run_dir: Path, first_step: int = 1) -> RunLogger:
    """Return the logger `name`, "none" or "tensorboard", of a run that begins at `first_step`."""
    if name == "tensorboard":
        return TensorBoardLogger(run_dir / FOLDER, first_step)
    return RunLogger()
