"""Building blocks of synthetic H&E tissue: nuclei, glands and a stroma texture.

Everything is a pair of stain maps, haematoxylin and eosin, uint8 with 255 for the densest stain
that occurs; `slide_render.py` turns them into colours. Lengths are pixels at 1 micron per pixel.
"""

import math
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

Floats = NDArray[np.floating]
Stains = NDArray[np.uint8]

TEXTURE_PX = 1024
_BANK_SEED = 20_190_319
_MEAN_OD = 1.1
_TUMOUR_STAIN = (205, 230)
_HUDDLE_PX = 6.2
_HUDDLE_MARGIN_PX = 10


@dataclass(frozen=True)
class Sprite:
    """A small piece of tissue to stamp: stains and opacity, each uint8 (rows, columns)."""

    haematoxylin: Stains
    eosin: Stains
    opacity: Stains

    @property
    def absorbed(self) -> float:
        """Light the sprite takes away, in pixels made black, with average stains on white."""
        transmitted = np.exp(-_MEAN_OD * self.haematoxylin.astype(np.float64) / 255)
        return float(((1 - transmitted) * self.opacity).sum() / 255)

    def faded(self, strength: float) -> "Sprite":
        """Return the sprite at `strength` (0 to 1) of its opacity, as if stained less."""
        return replace(self, opacity=_to_uint8(self.opacity * strength))

    def turned(self, quarter_turns: int, mirrored: bool) -> "Sprite":
        """Return one of the eight ways the sprite lies on a grid."""
        return Sprite(
            *(
                np.ascontiguousarray(np.rot90(plane[:, ::-1] if mirrored else plane, quarter_turns))
                for plane in (self.haematoxylin, self.eosin, self.opacity)
            )
        )


@dataclass(frozen=True)
class Bank:
    """Sprites of each kind; drawn from at random and laid in one of eight ways.

    Clump i has the place and the darkness of tumour nucleus i, but is a handful of
    lymphocytes: blurred beyond their size the two look alike.
    """

    tumour: tuple[Sprite, ...]
    clump: tuple[Sprite, ...]
    lymphocyte: tuple[Sprite, ...]
    pale: tuple[Sprite, ...]
    gland: tuple[Sprite, ...]


@lru_cache(maxsize=1)
def sprite_bank() -> Bank:
    """Return the sprites all slides share, made once per process and always the same."""
    rng = np.random.default_rng(_BANK_SEED)
    tumour = [_tumour_nucleus(rng) for _ in range(24)]
    return Bank(
        tumour=_eight_ways(tumour),
        clump=_eight_ways([_lymphocytes_like(rng, nucleus) for nucleus in tumour]),
        lymphocyte=_eight_ways([_lymphocyte(rng) for _ in range(8)]),
        pale=_eight_ways([_pale_nucleus(rng) for _ in range(12)]),
        gland=_eight_ways([_gland(rng) for _ in range(14)]),
    )


@lru_cache(maxsize=1)
def stroma_texture() -> Stains:
    """Return stroma as a tile that repeats seamlessly: uint8 (1024, 1024, 2), stains last.

    Wavy collagen bundles with clefts between them, spindle nuclei along them, a few lymphocytes.
    """
    rng = np.random.default_rng(_BANK_SEED + 1)
    n_px = TEXTURE_PX
    row = np.arange(n_px, dtype=np.float32)[:, None]
    sway = 22 * tileable_noise(rng, n_px, 130, 260) + 5 * tileable_noise(rng, n_px, 30, 90)
    fibres = tileable_noise(rng, n_px, 2.2, 40)
    bundles = tileable_noise(rng, n_px, 9, 110)
    fibres, bundles = (_sheared(field, row, sway) for field in (fibres, bundles))
    grain = tileable_noise(rng, n_px, 1.0, 1.0)
    clefts = np.clip(bundles - 0.95, 0, None)
    eosin = 118 + 17 * bundles + 15 * fibres + 6 * grain - 95 * clefts
    haematoxylin = 20 + 4 * fibres + 4 * grain + 5 * bundles - 20 * clefts
    planes = np.stack([haematoxylin, eosin], axis=-1)
    _stamp_spindles(rng, planes, sway)
    return _to_uint8(planes)


def tileable_noise(
    rng: np.random.Generator, n_px: int, scale_y_px: float, scale_x_px: float
) -> Floats:
    """Return Gaussian noise of mean 0 and deviation 1 that repeats seamlessly, float32 (n, n).

    Features are about `scale_y_px` tall and `scale_x_px` wide.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((n_px, n_px)))
    along_y = np.exp(-((math.pi * np.fft.fftfreq(n_px) * scale_y_px) ** 2) / 2)
    along_x = np.exp(-((math.pi * np.fft.rfftfreq(n_px) * scale_x_px) ** 2) / 2)
    spectrum *= along_y[:, None] * along_x[None, :]
    spectrum[0, 0] = 0
    noise: Floats = np.fft.irfft2(spectrum, (n_px, n_px)).astype(np.float32)
    noise /= noise.std()
    return noise


def _sheared(field: Floats, row: Floats, sway: Floats) -> Floats:
    """Bend straight horizontal fibres along `sway`, a displacement in pixels."""
    source_row = np.round(row + sway).astype(np.int64) % TEXTURE_PX
    return np.take_along_axis(field, source_row, axis=0)


def _stamp_spindles(rng: np.random.Generator, planes: Floats, sway: Floats) -> None:
    """Lay fibroblast nuclei along the fibres, and lymphocytes anywhere, wrapping at the edges."""
    slope = np.gradient(sway, axis=1)
    for index in range(1500):
        y, x = rng.integers(0, TEXTURE_PX, 2)
        if index % 9 == 0:
            sprite = _lymphocyte(rng)
        else:
            angle = math.atan(-float(slope[y, x])) + rng.normal(0, 0.12)
            sprite = _nucleus(
                rng, rng.uniform(7, 12), rng.uniform(2.2, 3.6), angle, rng.uniform(105, 165), 0.12
            )
        rows = (y + np.arange(sprite.opacity.shape[0])) % TEXTURE_PX
        columns = (x + np.arange(sprite.opacity.shape[1])) % TEXTURE_PX
        patch = planes[np.ix_(rows, columns)]
        opacity = sprite.opacity[..., None] / 255
        stains = np.stack([sprite.haematoxylin, sprite.eosin], axis=-1)
        planes[np.ix_(rows, columns)] = patch + (stains - patch) * opacity


def _eight_ways(sprites: list[Sprite]) -> tuple[Sprite, ...]:
    return tuple(
        sprite.turned(turns, mirrored)
        for sprite in sprites
        for turns in range(4)
        for mirrored in (False, True)
    )


def _tumour_nucleus(rng: np.random.Generator) -> Sprite:
    """Large, dark, irregular, with coarse chromatin: 10 to 17 px across."""
    long_px = rng.uniform(13, 17)
    return _nucleus(
        rng,
        long_px,
        long_px * rng.uniform(0.68, 0.95),
        rng.uniform(0, math.pi),
        rng.uniform(*_TUMOUR_STAIN),
        0.14,
        irregularity=0.13,
    )


def _lymphocyte(rng: np.random.Generator) -> Sprite:
    """Small, round and dark: 4 to 6 px."""
    long_px = rng.uniform(4.6, 5.8)
    return _nucleus(
        rng, long_px, long_px * rng.uniform(0.85, 1), rng.uniform(0, math.pi), 245, 0.06
    )


def _lymphocytes_like(rng: np.random.Generator, nucleus: Sprite) -> Sprite:
    """Return as many lymphocytes, huddled in the place of `nucleus`, as absorb its light."""
    n_px = len(nucleus.opacity) + 2 * _HUDDLE_MARGIN_PX
    planes = np.zeros((3, n_px, n_px), dtype=np.float32)
    missing = nucleus.absorbed
    for y, x in _huddle(rng, nucleus.opacity > 127) + n_px // 2:
        lymphocyte = _lymphocyte(rng)
        if missing < lymphocyte.absorbed / 2:
            break
        half_px = len(lymphocyte.opacity) // 2
        top, left = round(y) - half_px, round(x) - half_px
        window = planes[:, top : top + 2 * half_px + 1, left : left + 2 * half_px + 1]
        over = lymphocyte.opacity > window[2]
        for plane, stain in zip(window, astuple(lymphocyte), strict=True):
            plane[over] = stain[over]
        missing -= lymphocyte.absorbed
    return Sprite(*(_to_uint8(plane) for plane in planes))


def _huddle(rng: np.random.Generator, footprint: NDArray[np.bool_]) -> Floats:
    """Return places (y, x) around 0 on a jittered triangular lattice, those in `footprint` first.

    Beyond the footprint, the order is that of ever larger footprints of the same shape.
    """
    row, column = np.mgrid[-3:4, -3:4].reshape(2, -1)
    lattice = _HUDDLE_PX * np.stack([row * math.sqrt(3) / 2, column + row / 2], axis=1)
    turn = rng.uniform(0, math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    places = lattice @ np.array([[cos, -sin], [sin, cos]]) + rng.uniform(-3, 3, 2)
    places += rng.normal(0, 0.5, places.shape)
    spread = np.linalg.inv(np.cov((np.argwhere(footprint) - len(footprint) // 2).T))
    nearest: Floats = places[np.argsort(np.einsum("pi,ij,pj->p", places, spread, places))]
    return nearest


def _pale_nucleus(rng: np.random.Generator) -> Sprite:
    """Vesicular, of middle size, pale: a histiocyte or an endothelial cell, 8 to 11 px."""
    long_px = rng.uniform(8, 11)
    return _nucleus(
        rng,
        long_px,
        long_px * rng.uniform(0.6, 0.9),
        rng.uniform(0, math.pi),
        rng.uniform(95, 125),
        0.2,
    )


def _nucleus(
    rng: np.random.Generator,
    long_px: float,
    short_px: float,
    angle: float,
    stain: float,
    chromatin: float,
    irregularity: float = 0.04,
) -> Sprite:
    """Return one nucleus: an ellipse with a wavy outline, a darker membrane, mottled chromatin."""
    half_px = math.ceil(long_px * 0.65) + 2
    y, x = np.mgrid[-half_px : half_px + 1, -half_px : half_px + 1].astype(np.float32)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    theta = np.arctan2(across, along)
    outline = 1 + sum(
        irregularity / k * rng.normal() * np.cos(k * theta + rng.uniform(0, 2 * math.pi))
        for k in (2, 3, 4)
    )
    radius = np.hypot(along / (long_px / 2), across / (short_px / 2)) / outline
    inside_px = (1 - radius) * short_px / 2
    opacity = np.clip(inside_px / 1.4 + 0.5, 0, 1)
    mottle = _blurred(rng.standard_normal(radius.shape))
    membrane = np.exp(-(((inside_px - 0.8) / 0.9) ** 2))
    haematoxylin = stain * (1 + chromatin * (mottle + 0.6 * membrane - 0.3))
    eosin = np.full_like(haematoxylin, 62)
    return Sprite(_to_uint8(haematoxylin), _to_uint8(eosin), _to_uint8(255 * opacity))


def _gland(rng: np.random.Generator) -> Sprite:
    """Return a gland across its axis: lumen, columnar cells, nuclei at their base, sheath."""
    long_px, short_px = rng.uniform(34, 66), rng.uniform(26, 40)
    half_px = math.ceil(long_px * 1.35) + 8
    y, x = np.mgrid[-half_px : half_px + 1, -half_px : half_px + 1].astype(np.float32)
    theta = np.arctan2(y, x)
    phases = rng.uniform(0, 2 * math.pi, 6)
    wobble = 1 + sum(
        0.11 / k * np.cos(k * theta + phase) for k, phase in zip(range(2, 8), phases, strict=True)
    )
    radius_px = wobble / np.hypot(np.cos(theta) / long_px, np.sin(theta) / short_px)
    depth_px = (1 - np.hypot(x, y) / radius_px) * np.minimum(radius_px, 1.15 * short_px)
    cell_px = rng.uniform(17, 21)
    mottle = _blurred(rng.standard_normal(x.shape))
    lumen = np.clip((depth_px - cell_px + 1.5 * mottle) / 2.5 + 0.5, 0, 1)
    apical = np.clip((depth_px - 0.5 * cell_px) / 6 + 0.5, 0, 1)
    haematoxylin = (58 - 20 * apical + 6 * mottle) * (1 - lumen) + (2 + 3 * mottle) * lumen
    eosin = (96 - 14 * apical + 8 * mottle) * (1 - lumen) + (6 + 6 * mottle) * lumen
    _stamp_basal_nuclei(rng, haematoxylin, eosin, theta, radius_px)
    opacity = np.clip(depth_px / 2 + 1.5, 0, 1)
    return _trimmed(
        Sprite(_to_uint8(haematoxylin), _to_uint8(eosin), _to_uint8(255 * opacity)),
    )


def _stamp_basal_nuclei(
    rng: np.random.Generator, haematoxylin: Floats, eosin: Floats, theta: Floats, radius_px: Floats
) -> None:
    """Line the gland with oval nuclei that point at the lumen, about 7 px apart."""
    centre = haematoxylin.shape[0] // 2
    ring_theta = np.linspace(-math.pi, math.pi, 721)
    order = np.argsort(theta, axis=None)
    ring_radius = np.interp(ring_theta, theta.ravel()[order], radius_px.ravel()[order])
    ring_x, ring_y = ring_radius * np.cos(ring_theta), ring_radius * np.sin(ring_theta)
    walked_px = np.concatenate([[0], np.cumsum(np.hypot(np.diff(ring_x), np.diff(ring_y)))])
    for at_px in np.arange(0, walked_px[-1] - 4, 7.2):
        angle = float(np.interp(at_px + rng.normal(0, 0.7), walked_px, ring_theta))
        inset_px = rng.uniform(5.5, 8.5)
        distance = float(np.interp(angle, ring_theta, ring_radius)) - inset_px
        nucleus = _nucleus(
            rng,
            rng.uniform(8.5, 11),
            rng.uniform(5, 6.4),
            angle + rng.normal(0, 0.1),
            rng.uniform(165, 195),
            0.15,
        )
        half_px = nucleus.opacity.shape[0] // 2
        top = centre + round(distance * math.sin(angle)) - half_px
        left = centre + round(distance * math.cos(angle)) - half_px
        window = np.s_[top : top + 2 * half_px + 1, left : left + 2 * half_px + 1]
        opacity = nucleus.opacity / 255
        haematoxylin[window] += (nucleus.haematoxylin - haematoxylin[window]) * opacity
        eosin[window] += (nucleus.eosin - eosin[window]) * opacity


def _trimmed(sprite: Sprite) -> Sprite:
    """Cut off the empty margin, keeping the sprite square so that it can be turned."""
    rows = np.flatnonzero(sprite.opacity.any(axis=1))
    columns = np.flatnonzero(sprite.opacity.any(axis=0))
    margin = min(
        rows[0], columns[0], *(len(sprite.opacity) - 1 - np.array([rows[-1], columns[-1]]))
    )
    inner = slice(margin, len(sprite.opacity) - margin)
    return Sprite(
        sprite.haematoxylin[inner, inner], sprite.eosin[inner, inner], sprite.opacity[inner, inner]
    )


def _blurred(noise: Floats) -> Floats:
    """Return noise smoothed over about 3 px, with deviation 1."""
    blurred: Floats = uniform_filter(noise.astype(np.float32), 3, mode="wrap")
    blurred /= blurred.std()
    return blurred


def _to_uint8(field: Floats) -> Stains:
    rounded: Stains = np.clip(np.round(field), 0, 255).astype(np.uint8)
    return rounded
