"""Random changes of CT volumes that leave the answer right."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class VolumeAugment:
    """Mirroring left to right, shifts, and changes of brightness, for volumes on the grid.

    Uniform: shift within ± `shift` of each axis, brightness within 1 ± `gain`. Mirrored with
    probability `mirror`.
    """

    mirror: float = 0.5
    shift: float = 0.06
    gain: float = 0.1

    def __call__(self, grey: NDArray[np.uint16], rng: np.random.Generator) -> NDArray[np.uint16]:
        """Return a changed copy of uint16 (depth, rows, columns); 0, air, comes in from outside."""
        turned = grey[:, :, ::-1] if rng.random() < self.mirror else grey
        shifts = [round(float(rng.uniform(-self.shift, self.shift)) * n) for n in grey.shape]
        gain = np.float32(1 + rng.uniform(-self.gain, self.gain))
        most = np.float32(np.iinfo(np.uint16).max)
        moved = shifted(turned, shifts)
        changed: NDArray[np.uint16] = np.rint(np.minimum(moved * gain, most)).astype(np.uint16)
        return changed


def shifted(grey: NDArray[np.uint16], shifts: list[int]) -> NDArray[np.uint16]:
    """Return `grey` moved by so many voxels along each axis, zeros from outside."""
    moved = np.zeros_like(grey)
    to = tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shifts, grey.shape, strict=True))
    of = tuple(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shifts, grey.shape, strict=True))
    moved[to] = grey[of]
    return moved
