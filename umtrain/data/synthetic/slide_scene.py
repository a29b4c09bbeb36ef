"""What lies where on a synthetic slide: tissue, glands, clusters of cells, pen marks.

Note: [No shortcut to the label]
A positive slide is the negative slide of the same seed in which some clusters of lymphocytes are
nests of tumour nuclei: same places, same layout, as much light absorbed at every nucleus.
Nothing else depends on the label, so stain, ink, the amount of tissue and the number, area and
average darkness of clusters say nothing about it; only the size of the single nuclei does.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from umtrain.data.synthetic.tissue import Floats, Sprite, Stains, sprite_bank

CELL_PX = 16
BACKGROUND, BENIGN, CANCER = 0, 1, 2

_CLUSTERS_AT_2048 = 18
_NEST_SHARE = 0.75
_NUCLEI_PER_CLUSTER = (12, 25)
_NUCLEUS_SPACING_PX = 19.0
_CLUSTER_SPACING_PX = 125.0
_GLAND_SPACING_PX = 104.0
_INKS = ((38, 62, 150), (30, 120, 84), (38, 36, 42))


@dataclass(frozen=True)
class Stamp:
    """A sprite whose upper left corner lies at (y, x) of the slide."""

    y: int
    x: int
    sprite: Sprite


@dataclass(frozen=True)
class Ink:
    """Pen marks: opacity 0 to 1 on the coarse grid, and their colour."""

    opacity: Floats
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A slide before it is drawn; fields are float32 on a grid of one cell per 16 px.

    `density` is above 0.5 in tissue; `shift_y` and `shift_x` bend the stroma texture, in pixels;
    `shade` varies the stain. `stamps` are sorted by y. `mask` is uint8 on the same grid.
    """

    size_px: int
    density: Floats
    shift_y: Floats
    shift_x: Floats
    shade: Floats
    stamps: tuple[Stamp, ...]
    ink: Ink | None
    mask: Stains


def build_scene(size_px: int, seed: int, positive: bool) -> Scene:
    """Return the scene of a slide of `size_px` pixels a side; same arguments, same scene."""
    layout, cells = (np.random.default_rng((seed, stream)) for stream in range(2))
    n_cells = math.ceil(size_px / CELL_PX)
    density = _tissue(layout, n_cells)
    inner = ndimage.distance_transform_edt(density > 0.5) * CELL_PX
    n_clusters = round(_CLUSTERS_AT_2048 * math.sqrt(size_px / 2048)) + int(layout.integers(-2, 3))
    n_others = max(3, n_clusters // 3)
    spots = _cluster_spots(layout, inner, n_clusters + n_others)
    matched, others = spots[: len(spots) - n_others], spots[len(spots) - n_others :]
    stamps = _glands(layout, inner, spots)
    for spot in others:
        stamps += _other_cluster(layout, spot)
    mask = np.where(density > 0.5, BENIGN, BACKGROUND).astype(np.uint8)
    n_nests = max(1, round(_NEST_SHARE * len(matched))) if positive else 0
    for index, spot in enumerate(matched):
        stamps += _cluster(cells, spot, nest=index < n_nests, mask=mask)
    return Scene(
        size_px=size_px,
        density=density,
        shift_y=100 * _smooth_noise(layout, n_cells, 480),
        shift_x=80 * _smooth_noise(layout, n_cells, 480),
        shade=1
        + 0.1 * _smooth_noise(layout, n_cells, 500)
        + 0.05 * _smooth_noise(layout, n_cells, 90),
        stamps=tuple(sorted(stamps, key=lambda stamp: (stamp.y, stamp.x))),
        ink=_ink(layout, n_cells),
        mask=mask,
    )


def _smooth_noise(rng: np.random.Generator, n_cells: int, scale_px: float) -> Floats:
    """Return noise of deviation near 1 whose features are about `scale_px` wide."""
    step = scale_px / CELL_PX
    n_knots = math.ceil(n_cells / step) + 3
    knots = Image.fromarray(rng.standard_normal((n_knots, n_knots)).astype(np.float32))
    left, top = rng.uniform(0, 1, 2)
    box = (left, top, left + n_cells / step, top + n_cells / step)
    return np.asarray(knots.resize((n_cells, n_cells), Image.Resampling.BICUBIC, box=box)) * 1.3


def _tissue(rng: np.random.Generator, n_cells: int) -> Floats:
    """Return one or two sections with ragged outlines, some of them torn."""
    y, x = (np.mgrid[0:n_cells, 0:n_cells] + 0.5) / n_cells
    size_px = n_cells * CELL_PX
    two = rng.uniform() < 0.3
    centres = ((0.3, 0.5), (0.72, 0.5)) if two else ((0.5, 0.5),)
    inside = np.full((n_cells, n_cells), -1.0)
    for centre_x, centre_y in centres:
        angle = rng.uniform(0, math.pi)
        radius_a, radius_b = rng.uniform(0.36, 0.44), rng.uniform(0.36, 0.44)
        squeeze = 0.5 if two else 1.0
        away_x = (x - centre_x + rng.normal(0, 0.015)) / squeeze
        away_y = y - centre_y + rng.normal(0, 0.015)
        along = (away_x * math.cos(angle) + away_y * math.sin(angle)) / radius_a
        across = (away_y * math.cos(angle) - away_x * math.sin(angle)) / radius_b
        inside = np.maximum(inside, 1 - np.hypot(along, across))
    for scale, strength in ((0.28, 0.10), (0.11, 0.045), (0.04, 0.02)):
        inside += strength * _smooth_noise(rng, n_cells, scale * size_px)
    tears = np.abs(_smooth_noise(rng, n_cells, 0.3 * size_px)) < 0.02
    tears &= _smooth_noise(rng, n_cells, 0.2 * size_px) > 0.9
    steepness = 0.02 + 40 / size_px
    density = np.clip(0.5 + inside / (2 * steepness), 0, 1)
    density[tears] *= 0.3
    return density.astype(np.float32)


def _cluster_spots(
    rng: np.random.Generator, inner_px: Floats, n_spots: int
) -> list[tuple[int, int]]:
    """Return up to `n_spots` places (y, x) well inside the tissue, in random order, far apart."""
    cells = np.argwhere(inner_px > 75)
    spots: list[tuple[int, int]] = []
    for y, x in rng.permutation(cells)[: 400 * n_spots] * CELL_PX + CELL_PX // 2:
        if all(
            math.hypot(y - other_y, x - other_x) > _CLUSTER_SPACING_PX for other_y, other_x in spots
        ):
            spots.append((int(y), int(x)))
        if len(spots) == n_spots:
            break
    return spots


def _glands(
    rng: np.random.Generator, inner_px: Floats, spots: list[tuple[int, int]]
) -> list[Stamp]:
    """Return glands on a jittered lattice in the glandular parts, clear of the clusters."""
    n_cells = len(inner_px)
    glandular = _smooth_noise(rng, n_cells, 520) > 0.0
    free = inner_px > 55
    yy, xx = np.mgrid[0:n_cells, 0:n_cells] * CELL_PX + CELL_PX // 2
    for spot_y, spot_x in spots:
        free &= np.hypot(yy - spot_y, xx - spot_x) > 105
    stamps = []
    bank = sprite_bank().gland
    lattice = np.arange(0, n_cells * CELL_PX, _GLAND_SPACING_PX).tolist()
    for row, y in enumerate(lattice):
        for x in lattice:
            jitter_y, jitter_x = rng.normal(0, 0.11 * _GLAND_SPACING_PX, 2)
            sprite = bank[rng.integers(len(bank))]
            skip = rng.uniform() < 0.12
            at_y, at_x = (
                y + float(jitter_y),
                x + float(jitter_x) + (row % 2) * _GLAND_SPACING_PX / 2,
            )
            cell = int(at_y) // CELL_PX, int(at_x) // CELL_PX
            if skip or max(cell) >= n_cells or min(at_y, at_x) < 0:
                continue
            if free[cell] and glandular[cell]:
                stamps.append(_centred(sprite, at_y, at_x))
    return stamps


def _cluster(
    rng: np.random.Generator, spot: tuple[int, int], nest: bool, mask: Stains
) -> list[Stamp]:
    """Return 12 to 24 tumour nuclei (marked in the mask), or as many clumps of lymphocytes."""
    bank = sprite_bank().tumour if nest else sprite_bank().clump
    n_nuclei = int(rng.integers(*_NUCLEI_PER_CLUSTER))
    strength = rng.uniform(0.75, 1)
    radius_px = 0.66 * _NUCLEUS_SPACING_PX * math.sqrt(n_nuclei)
    places = _apart(_disc(rng, spot, radius_px, 12 * n_nuclei), n_nuclei, _NUCLEUS_SPACING_PX)
    stamps = [_centred(bank[rng.integers(len(bank))].faded(strength), y, x) for y, x in places]
    if nest:
        yy, xx = np.ogrid[0 : len(mask), 0 : len(mask)]
        away_px = np.hypot(yy * CELL_PX + 8 - spot[0], xx * CELL_PX + 8 - spot[1])
        mask[away_px < radius_px + 10] = CANCER
    return stamps


def _other_cluster(rng: np.random.Generator, spot: tuple[int, int]) -> list[Stamp]:
    """Return a dense lymphoid aggregate or a loose group of pale, middle-sized nuclei."""
    bank = sprite_bank()
    if rng.uniform() < 0.5:
        n_cells, spacing_px, kind = int(rng.integers(60, 140)), 5.2, bank.lymphocyte
    else:
        n_cells, spacing_px, kind = int(rng.integers(16, 36)), 11.0, bank.pale
    spread_px = 0.5 * spacing_px * math.sqrt(n_cells) * rng.uniform(0.9, 1.2, 2)
    candidates = rng.normal(spot, spread_px, (8 * n_cells, 2))
    places = _apart(candidates, n_cells, spacing_px)
    return [_centred(kind[rng.integers(len(kind))], y, x) for y, x in places]


def _disc(rng: np.random.Generator, spot: tuple[int, int], radius_px: float, n: int) -> Floats:
    """Return `n` places (y, x), even over a disc around `spot`."""
    angle = rng.uniform(0, 2 * math.pi, n)
    away_px = radius_px * np.sqrt(rng.uniform(0, 1, n))
    return np.stack([away_px * np.sin(angle), away_px * np.cos(angle)], axis=1) + spot


def _apart(candidates: Floats, n_places: int, apart_px: float) -> list[tuple[float, float]]:
    """Return the first `n_places` of the candidates that keep their distance from those before."""
    kept: list[tuple[float, float]] = []
    for y, x in candidates.tolist():
        if all((y - other_y) ** 2 + (x - other_x) ** 2 > apart_px**2 for other_y, other_x in kept):
            kept.append((y, x))
        if len(kept) == n_places:
            break
    return kept


def _centred(sprite: Sprite, y: float, x: float) -> Stamp:
    half_px = len(sprite.opacity) / 2
    return Stamp(round(y - half_px), round(x - half_px), sprite)


def _ink(rng: np.random.Generator, n_cells: int) -> Ink | None:
    """Return a pen stroke near the edge of two slides in five."""
    inked = rng.uniform() < 0.4
    colour = _INKS[rng.integers(len(_INKS))]
    start, length = rng.uniform(0, 0.5), rng.uniform(0.25, 0.5)
    depth = rng.uniform(0.02, 0.07)
    turns = int(rng.integers(4))
    wobble = np.cumsum(rng.normal(0, 0.004, 24))
    if not inked:
        return None
    along = np.linspace(start, start + length, 24)
    fine = 4 * n_cells
    points = [(fine * at, fine * (depth + off)) for at, off in zip(along, wobble, strict=True)]
    canvas = Image.new("L", (fine, fine), 0)
    ImageDraw.Draw(canvas).line(points, fill=215, width=max(2, round(0.028 * fine)), joint="curve")
    soft = canvas.filter(ImageFilter.GaussianBlur(2)).reduce(4)
    return Ink(np.rot90(np.asarray(soft, dtype=np.float32) / 255, turns).copy(), colour)
