"""The class-probability map of a slide: one position a patch, kept as a file of arrays."""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from umtrain.errors import RunError
from umtrain.files import write_atomic

Floats = NDArray[np.float32]

CANCER_ROW = 2


@dataclass(frozen=True)
class ProbabilityMap:
    """What a patch network says of a slide, patch by patch.

    `probs` is float32 (3, rows, columns): background, benign, cancer, which add up to 1. `tissue`
    is bool (rows, columns): where the network looked; elsewhere it is background for certain.
    Position (row, column) is the square of `l0_side` level-0 pixels whose upper left corner is
    (l0_x + column * l0_side, l0_y + row * l0_side).
    """

    probs: Floats
    tissue: NDArray[np.bool_]
    l0_x: float
    l0_y: float
    l0_side: float

    @property
    def cancer(self) -> Floats:
        """The probability of cancer: float32 (rows, columns)."""
        cancer: Floats = self.probs[CANCER_ROW]
        return cancer

    def to_l0(self, column: float, row: float) -> tuple[float, float]:
        """Return the level-0 position (x, y) of a position in the map."""
        return self.l0_x + self.l0_side * column, self.l0_y + self.l0_side * row

    def to_map(self, l0_x: float, l0_y: float) -> tuple[float, float]:
        """Return the position (column, row) in the map of a level-0 position."""
        return (l0_x - self.l0_x) / self.l0_side, (l0_y - self.l0_y) / self.l0_side


def empty_map(n_rows: int, n_columns: int, l0_side: float) -> ProbabilityMap:
    """Return the map of a slide, from its upper left corner on, that is background all over."""
    probs = np.zeros((3, n_rows, n_columns), np.float32)
    probs[0] = 1
    return ProbabilityMap(probs, np.zeros((n_rows, n_columns), np.bool_), 0.0, 0.0, l0_side)


def write_map(path: Path, values: ProbabilityMap) -> None:
    """Write a map to `path`, atomically, as an .npz with the fields of `ProbabilityMap`."""
    write_atomic(path, lambda stream: np.savez_compressed(stream, **vars(values)))


def read_map(path: Path) -> ProbabilityMap:
    """Return what `write_map` wrote. Raises RunError if the file is missing or damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return ProbabilityMap(
                arrays["probs"],
                arrays["tissue"],
                *(float(arrays[name]) for name in ("l0_x", "l0_y", "l0_side")),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise RunError(
            f"{path}: not readable as a probability map ({error}); evaluate the run again"
        ) from error
