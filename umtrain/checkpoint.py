"""Checkpoints: whole files of tensors and plain values, loaded without running code."""

from pathlib import Path
from typing import Any

import torch

from umtrain.errors import RunError
from umtrain.files import write_atomic

FOLDER = "checkpoints"
BEST = "best.pt"
LAST = "last.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically."""
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda stream: torch.save(state, stream))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what save_checkpoint wrote, on the CPU.

    Raises RunError if the file is missing, damaged or holds anything but tensors and values.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: no such checkpoint; the run has not finished an epoch") from None
    except Exception as error:
        raise RunError(
            f"{path}: damaged or not a checkpoint of umtrain; train again, or restore the file"
        ) from error
    return state
