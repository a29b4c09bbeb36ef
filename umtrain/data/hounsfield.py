"""A scan as a file holds it: Hounsfield units, and where its voxels lie in the patient."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

AIR_HU = -1024
_LARGEST_HU = 2**15 - 1


@dataclass(frozen=True)
class Scan:
    """Hounsfield units, int16, in the axes of the file.

    `affine_ras` (4, 4) takes voxel indices to millimetres to the right, front and head.
    """

    hu: NDArray[np.int16]
    affine_ras: NDArray[np.float64]


def to_hu(values: NDArray[np.floating]) -> NDArray[np.int16]:
    """Return `values` as whole Hounsfield units; what is below air, or no number, becomes air."""
    known = np.nan_to_num(values, nan=AIR_HU, posinf=_LARGEST_HU, neginf=AIR_HU)
    whole: NDArray[np.int16] = np.rint(np.clip(known, AIR_HU, _LARGEST_HU)).astype(np.int16)
    return whole
