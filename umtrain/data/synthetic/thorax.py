"""A thorax in Hounsfield units: body wall, ribs, spine, heart, lungs and their vessels.

A positive one has a solid mass in a lung. All, positive or not, have vessels, and half of them a
thick one seen from its side, as bright as a mass, but thin and long. Chests differ in size by more
than a mass does: brightness, or the amount of tissue in the whole volume, does not tell the classes
apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Point = NDArray[np.float64]

# Millimetres to the patient's left, back and head from the middle of the chest.
HEIGHT_MM = 240.0
WIDTH_MM = 360.0
MASS_DIAMETER_MM = (40.0, 60.0)

_AIR, _FAT, _SOFT, _BLOOD, _BONE = -1000.0, -95.0, 45.0, 60.0, 420.0
_MASS = 40.0
_LUNG_HU = (-890.0, -820.0)
_NOISE_HU = 22.0
_N_BRANCHES = 16
_DECOY_SHARE = 0.5
_N_PLACES = 8
_AERATED_HU = -650.0
_EDGE_MM = 1.2


@dataclass(frozen=True)
class Mass:
    """Where a mass lies, in mm to the left, back and head, and how wide it is."""

    center_mm: tuple[float, float, float]
    diameter_mm: float


@dataclass(frozen=True)
class Thorax:
    """Hounsfield units, float32 (slices, rows, columns): towards the head, the back, the left.

    `spacing_mm` is (slice, row, column).
    """

    hu: Floats
    spacing_mm: tuple[float, float, float]
    mass: Mass | None


def make_thorax(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    seed: int,
    *,
    positive: bool,
) -> Thorax:
    """Return the thorax that `seed` stands for, sampled on a grid around its middle."""
    rng = np.random.default_rng(seed)
    canvas = _Canvas(shape, spacing_mm)
    body = rng.uniform(0.92, 1.06)
    _wall(canvas, body)
    lungs = [_lung(canvas, side, body, rng) for side in (-1, 1)]
    _mediastinum(canvas, body, rng)
    for lung in lungs:
        _vessels(canvas, lung, rng)
    if rng.uniform() < _DECOY_SHARE:
        _decoy(canvas, lungs[int(rng.integers(2))], rng)
    mass = _mass(canvas, lungs[int(rng.integers(2))], rng) if positive else None
    noise = rng.normal(0, _NOISE_HU, shape).astype(np.float32)
    return Thorax(canvas.hu + noise, spacing_mm, mass)


class _Canvas:
    """A grid to draw on, in mm; edges are as soft as a scanner's."""

    def __init__(self, shape: tuple[int, int, int], spacing_mm: tuple[float, ...]) -> None:
        self.hu: Floats = np.full(shape, _AIR, np.float32)
        z, y, x = (
            ((np.arange(n) - (n - 1) / 2) * spacing).astype(np.float32)
            for n, spacing in zip(shape, spacing_mm, strict=True)
        )
        self.x, self.y, self.z = x[None, None, :], y[None, :, None], z[:, None, None]
        self._axes = (z, y, x)

    def fill(self, outside_mm: Floats, hu: float, box: tuple[slice, ...] = (slice(None),)) -> None:
        """Set what lies inside, where the distance from the surface is below 0, to `hu`."""
        share = np.clip(0.5 - outside_mm / _EDGE_MM, 0, 1)
        part = self.hu[box]
        part += share * (np.float32(hu) - part)

    def ellipsoid(self, center: Point, radii: Point, hu: float) -> None:
        """Fill an ellipsoid; `center` and `radii` are (left, back, head) in mm."""
        self.fill(self._outside_ellipsoid(center, radii), hu)

    def _outside_ellipsoid(self, center: Point, radii: Point) -> Floats:
        scaled = [
            (axis - np.float32(c)) / np.float32(r)
            for axis, c, r in zip((self.x, self.y, self.z), center, radii, strict=True)
        ]
        return (np.sqrt(sum(s * s for s in scaled)) - 1) * np.float32(min(radii))

    def column(self, center: Point, radii: Point, hu: float) -> None:
        """Fill an elliptic column from feet to head; `center` and `radii` are (left, back)."""
        x, y = (self.x - center[0]) / radii[0], (self.y - center[1]) / radii[1]
        outside = (np.sqrt(x * x + y * y) - 1) * min(radii)
        self.fill(np.broadcast_to(outside.astype(np.float32), self.hu.shape), hu)

    def capsule(self, start: Point, end: Point, radius_mm: float, hu: float) -> None:
        """Fill a tube with round ends, in the part of the grid that it touches."""
        box = self._box(start, end, radius_mm + _EDGE_MM)
        x, y, z = self.x[:, :, box[2]], self.y[:, box[1]], self.z[box[0]]
        along = np.asarray(end - start, np.float32)
        dx, dy, dz = (axis - np.float32(s) for axis, s in zip((x, y, z), start, strict=True))
        length = float(along @ along)
        share = np.clip((dx * along[0] + dy * along[1] + dz * along[2]) / max(length, 1e-6), 0, 1)
        squares = [
            (delta - share * step) ** 2 for delta, step in zip((dx, dy, dz), along, strict=True)
        ]
        self.fill(np.sqrt(sum(squares)) - np.float32(radius_mm), hu, box)

    def mean_hu(self, center: Point, reach_mm: float) -> float:
        """Return what is drawn so far in the cube that reaches so far from `center`."""
        return float(self.hu[self._box(center, center, reach_mm)].mean())

    def _box(self, start: Point, end: Point, reach_mm: float) -> tuple[slice, ...]:
        low, high = np.minimum(start, end) - reach_mm, np.maximum(start, end) + reach_mm
        return tuple(
            slice(*np.searchsorted(axis, (low[at], high[at])))
            for axis, at in zip(self._axes, (2, 1, 0), strict=True)
        )


@dataclass(frozen=True)
class _Lung:
    """An ellipsoid: middle and radii in mm (left, back, head); `side` is 1 to the left."""

    side: int
    center: Point
    radii: Point

    def point(self, rng: np.random.Generator, within: float) -> Point:
        """Return a point at most `within` of the way from the middle to the surface."""
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        share = within * rng.uniform() ** (1 / 3)
        return np.asarray(self.center + direction * self.radii * share)

    @property
    def hilum(self) -> Point:
        """Return where the vessels come in."""
        return self.center + np.array([-self.side * 0.62, 0.1, -0.05]) * self.radii


def _wall(canvas: _Canvas, body: float) -> None:
    canvas.column(np.array([0.0, 0.0]), np.array([165.0, 115.0]) * body, _FAT)
    canvas.column(np.array([0.0, 0.0]), np.array([152.0, 102.0]) * body, _SOFT)
    _ribs(canvas, body)
    canvas.column(np.array([0.0, 68.0]) * body, np.array([17.0, 15.0]), _BONE)


def _ribs(canvas: _Canvas, body: float) -> None:
    """A bony shell, cut into bands that fall from back to front."""
    x, y = canvas.x / (140 * body), canvas.y / (92 * body)
    shell = np.abs(np.sqrt(x * x + y * y) - 1) * 92 * body - 4
    fall = (canvas.z + 0.45 * canvas.y) % 26
    band = np.abs(fall - 13) - 6
    canvas.fill(np.maximum(shell, band).astype(np.float32), _BONE)


def _lung(canvas: _Canvas, side: int, body: float, rng: np.random.Generator) -> _Lung:
    center = np.array([side * 74.0, rng.uniform(-6, 4), rng.uniform(-12, 4)]) * body
    radii = np.array([52.0, 78.0, 112.0]) * body * rng.uniform(0.94, 1.04, 3)
    canvas.ellipsoid(center, radii, rng.uniform(*_LUNG_HU))
    return _Lung(side, center, radii)


def _mediastinum(canvas: _Canvas, body: float, rng: np.random.Generator) -> None:
    heart = np.array([24.0, -22.0, -42.0]) * body + rng.uniform(-5, 5, 3)
    canvas.ellipsoid(heart, np.array([50.0, 40.0, 46.0]) * body * rng.uniform(0.9, 1.1), _SOFT)
    aorta = np.array([20.0, 52.0]) * body
    canvas.column(aorta, np.array([12.0, 12.0]), _BLOOD)
    top = np.array([0.0, 20.0, HEIGHT_MM])
    canvas.capsule(np.array([0.0, 22.0, 18.0]), top, 8.0, _AIR)


def _vessels(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    """Draw branches that leave the hilum, bend once and become thin."""
    for _ in range(_N_BRANCHES):
        bend = lung.point(rng, 0.6)
        end = lung.point(rng, 0.95)
        radius_mm = rng.uniform(1.2, 2.6)
        canvas.capsule(lung.hilum, bend, radius_mm, _BLOOD)
        canvas.capsule(bend, end, 0.55 * radius_mm, _BLOOD)


def _decoy(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> None:
    """Draw a thick vessel as bright as a mass, but long."""
    middle = lung.point(rng, 0.45)
    direction = rng.normal(size=3) * np.array([0.6, 0.6, 1.0])
    half = direction / np.linalg.norm(direction) * rng.uniform(20, 30)
    canvas.capsule(middle - half, middle + half, rng.uniform(3.5, 5.0), _MASS)


def _mass(canvas: _Canvas, lung: _Lung, rng: np.random.Generator) -> Mass:
    """Draw a mass in aerated lung: inside the heart, as bright as it is, it would be no finding.

    Of a few places the first is taken that is free, or else the freest.
    """
    diameter_mm = rng.uniform(*MASS_DIAMETER_MM)
    places = [lung.point(rng, 0.72) for _ in range(_N_PLACES)]
    around_hu = [canvas.mean_hu(place, diameter_mm / 2) for place in places]
    free = [at for at, hu in enumerate(around_hu) if hu < _AERATED_HU]
    center = places[free[0] if free else int(np.argmin(around_hu))]
    canvas.ellipsoid(center, diameter_mm / 2 * rng.uniform(0.9, 1.1, 3), _MASS)
    x, y, z = (float(value) for value in center)
    return Mass((x, y, z), diameter_mm)
