"""Random changes that leave the answer right: numpy in, numpy out, given the generator.

Slides have no up or down and vary in their stains; standing radiographs vary a little in pose,
distance and exposure, and a mirrored patient faces the other way.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from umtrain.data.frame import Affine, inverse, transform

_TILE_PX = 256
# Haematoxylin, eosin and DAB in optical density of red, green and blue: Ruifrok and Johnston,
# Anal Quant Cytol Histol 2001, 23:291-299.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)

_DENSITY_MAX = math.log(256)
_DENSITY_OF_VALUE = (_DENSITY_MAX - np.log1p(np.arange(256))).astype(np.float32)
_DENSITY_STEPS = 2**12
_VALUE_OF_STEP = np.rint(
    256 * np.exp(-np.arange(_DENSITY_STEPS) * (_DENSITY_MAX / (_DENSITY_STEPS - 1))) - 1
).astype(np.uint8)

_GEOMETRY_TRIES = 10


@dataclass(frozen=True, slots=True)
class SlideAugment:
    """Flips, quarter turns and stain jitter for slides.

    The amount of each stain is scaled by 1 ± `stain_scale` and shifted by ± `stain_shift` (in
    units of optical density), uniformly, per image: Tellez et al., IEEE Trans Med Imaging 2018,
    37:2126 ("HED-light" is 0.05 for both).
    """

    stain_scale: float = 0.05
    stain_shift: float = 0.05

    def __call__(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Return a changed copy of a square uint8 (res, res, 3) RGB `image`."""
        turned = np.rot90(image, k=int(rng.integers(4)))
        if rng.integers(2):
            turned = turned[:, ::-1]
        scale = 1 + rng.uniform(-self.stain_scale, self.stain_scale, 3)
        shift = rng.uniform(-self.stain_shift, self.stain_shift, 3)
        return scale_stains(turned, scale, shift)


def scale_stains(
    image: NDArray[np.uint8], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Return uint8 (rows, columns, 3) RGB with each stain's amount a made a * scale + shift.

    `scale` and `shift` are (3,): haematoxylin, eosin, DAB. Works tile by tile, so that besides
    the copy it needs a few MiB, and views that are turned by 90° read memory in short rows.
    """
    mix = np.linalg.inv(_STAINS) @ np.diag(scale) @ _STAINS
    steps_per_density = (_DENSITY_STEPS - 1) / _DENSITY_MAX
    matrix = (mix * steps_per_density).astype(np.float32)
    offset = (shift @ _STAINS * steps_per_density).astype(np.float32)
    changed = np.empty(image.shape, np.uint8)
    for top in range(0, image.shape[0], _TILE_PX):
        for left in range(0, image.shape[1], _TILE_PX):
            tile = np.s_[top : top + _TILE_PX, left : left + _TILE_PX]
            steps = _DENSITY_OF_VALUE[image[tile]] @ matrix
            steps += offset
            np.clip(steps, 0, _DENSITY_STEPS - 1, out=steps)
            changed[tile] = _VALUE_OF_STEP[steps.astype(np.uint16)]
    return changed


@dataclass(frozen=True, slots=True)
class RadiographAugment:
    """Small rotations, scaling, shifts and mirroring, and changes of exposure, for radiographs.

    Uniform: rotation within ± `rotation_deg`, scale within 1 ± `scaling`, shift within
    ± `shift` of the height, log2 of gamma within ± `gamma_log2`, brightness within 1 ± `gain`.
    Mirrored with probability `mirror`.
    """

    rotation_deg: float = 5.0
    scaling: float = 0.1
    shift: float = 0.05
    gamma_log2: float = 0.3
    gain: float = 0.1
    mirror: float = 0.5

    def __call__(
        self,
        pixels: NDArray[np.uint16],
        keypoints_xy: NDArray[np.float64],
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.uint16], Affine]:
        """Return changed uint16 (rows, columns) `pixels`, and the map from old to new (x, y).

        A map with a negative determinant mirrors, and so swaps the side the patient faces. The
        (n, 2) `keypoints_xy` are not moved here, but a map that would put them outside is not
        drawn.
        """
        moved = self._draw_map(pixels.shape, keypoints_xy, rng)
        return self._expose(warp(pixels, moved), rng), moved

    def _draw_map(
        self, shape: tuple[int, ...], keypoints_xy: NDArray[np.float64], rng: np.random.Generator
    ) -> Affine:
        """Return a random map that keeps the keypoints in the frame; a mere mirror if none does."""
        limits = np.array([shape[1], shape[0]]) - 1
        mirrored = rng.random() < self.mirror
        for _ in range(_GEOMETRY_TRIES):
            angle = math.radians(rng.uniform(-self.rotation_deg, self.rotation_deg))
            scale = 1 + rng.uniform(-self.scaling, self.scaling)
            shift = rng.uniform(-self.shift, self.shift, 2) * shape[0]
            drawn = _about_centre(limits / 2, angle, scale, shift, mirrored)
            moved = transform(keypoints_xy, drawn)
            if np.all((moved >= 0) & (moved <= limits)):
                return drawn
        return _about_centre(limits / 2, 0.0, 1.0, np.zeros(2), mirrored)

    def _expose(self, pixels: NDArray[np.uint16], rng: np.random.Generator) -> NDArray[np.uint16]:
        gamma = 2 ** rng.uniform(-self.gamma_log2, self.gamma_log2)
        gain = 1 + rng.uniform(-self.gain, self.gain)
        grey = np.linspace(0, 1, 2**16)
        table = np.rint(np.clip(gain * grey**gamma, 0, 1) * (2**16 - 1)).astype(np.uint16)
        exposed: NDArray[np.uint16] = table[pixels]
        return exposed


def warp(pixels: NDArray[np.uint16], moved: Affine) -> NDArray[np.uint16]:
    """Return uint16 (rows, columns) `pixels` under the map, bilinear, zeros from outside."""
    back = inverse(moved)
    warped: NDArray[np.uint16] = ndimage.affine_transform(
        pixels, back[::-1, 1::-1], back[::-1, 2], order=1, output=np.uint16
    )
    return warped


def _about_centre(
    centre_xy: NDArray[np.float64],
    angle: float,
    scale: float,
    shift_xy: NDArray[np.float64],
    mirrored: bool,
) -> Affine:
    """Return the map that mirrors left to right or not, turns and scales about the centre."""
    linear = scale * np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    if mirrored:
        linear = linear @ np.diag([-1.0, 1.0])
    return np.column_stack([linear, centre_xy - linear @ centre_xy + shift_xy])
