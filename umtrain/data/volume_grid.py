"""A CT volume on the grid of voxels that a network sees.

# Note: [Sparse weights]
A voxel of the grid has a handful of the scan's under it, so weights are sparse matrices. That is
less work, and work of one thread: dense products of such small matrices go to BLAS, whose threads
wait for each other in a loop and, beside a training that uses all cores, took seconds a volume.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from umtrain.data.ct import CtVolume
from umtrain.data.hounsfield import AIR_HU

_MOST_GREY = 2**16 - 1


@dataclass(frozen=True)
class Grid:
    """Slices, rows and columns of the network's input, and how wide their voxels are.

    With `spacing_mm` voxels are cubes of that size around the middle of the volume: what lies
    outside of the grid is cut away, and where nothing was scanned is air. Without, the grid spans
    the whole volume.
    """

    depth: int
    rows: int
    columns: int
    spacing_mm: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (depth, rows, columns)."""
        return self.depth, self.rows, self.columns


@dataclass(frozen=True)
class HounsfieldWindow:
    """The Hounsfield units that grey values tell apart: `width` of them around `center`."""

    center: float
    width: float

    def grey(self, hu: NDArray[np.floating]) -> NDArray[np.uint16]:
        """Return 0 at the lower end and below, 65535 at the upper end and above."""
        share = (hu - np.float32(self.center - self.width / 2)) / np.float32(self.width)
        grey: NDArray[np.uint16] = np.rint(np.clip(share, 0, 1) * _MOST_GREY).astype(np.uint16)
        return grey


def resample(volume: CtVolume, grid: Grid) -> NDArray[np.float32]:
    """Return Hounsfield units, float32 (depth, rows, columns), on `grid`.

    Shrinking averages over what a voxel covers, as a triangle filter; enlarging is linear.
    See Note: [Sparse weights].
    """
    steps = (
        [n_in / n_out for n_in, n_out in zip(volume.hu.shape, grid.shape, strict=True)]
        if grid.spacing_mm is None
        else [grid.spacing_mm / spacing for spacing in volume.spacing_mm]
    )
    slices, rows, columns = (
        csr_array(axis_weights(n_in, n_out, step))
        for n_in, n_out, step in zip(volume.hu.shape, grid.shape, steps, strict=True)
    )
    # Slice by slice: a volume in float32 would take more than all else.
    planes = [(columns @ (rows @ (plane - np.float32(AIR_HU))).T).T for plane in volume.hu]
    above_air: NDArray[np.float32] = slices @ np.stack(planes).reshape(len(planes), -1)
    return above_air.reshape(grid.shape) + np.float32(AIR_HU)


def axis_weights(n_in: int, n_out: int, step: float) -> NDArray[np.float32]:
    """Return (n_out, n_in) weights that make `n_out` samples, `step` inputs apart, of `n_in`.

    The middles of both coincide. A sample outside of the input has no weights.
    """
    centres = (np.arange(n_out) - (n_out - 1) / 2) * step + (n_in - 1) / 2
    reach = max(1.0, step)
    distance = np.abs(np.arange(n_in) - centres[:, None])
    weights = np.clip(1 - distance / reach, 0, None)
    inside = (centres > -0.5 - 1e-9) & (centres < n_in - 0.5 + 1e-9)
    weights[~inside] = 0
    total = weights.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(weights, total, where=total > 0, out=weights)
    return shares.astype(np.float32)
