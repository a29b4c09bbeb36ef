"""A raster in the body frame: shapes in millimetres, drawn as smooth fields on their own patch.

A shape is its depth field: for every pixel, how many millimetres it lies inside the outline
(negative: outside). Fields are sampled at pixel centres, which have integer coordinates, so
shapes keep their exact sub-pixel position at any resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Point = tuple[float, float]


@dataclass(frozen=True)
class Patch:
    """A window of the raster: its rows and columns, and the body-frame x (1, w) and y (h, 1)."""

    rows: slice
    columns: slice
    x_mm: np.ndarray
    y_mm: np.ndarray


class Canvas:
    """A float32 raster `values` (rows, columns) placed in the body frame.

    origin_px: (x, y) of the body frame's origin. direction: +1 if anterior is to the right.
    """

    def __init__(
        self, shape: tuple[int, int], mm_per_px: float, origin_px: Point, direction: int
    ) -> None:
        self.values = np.zeros(shape, np.float32)
        self.mm_per_px = mm_per_px
        self._origin_px = origin_px
        self._direction = direction

    def coarser(self, factor: int) -> "Canvas":
        """Return an empty canvas of the same field with `factor` times larger pixels."""
        rows, columns = self.values.shape
        shape = (-(-rows // factor), -(-columns // factor))
        # The centre of a large pixel is the mean of the centres of the small ones in it.
        x, y = ((at - (factor - 1) / 2) / factor for at in self._origin_px)
        return Canvas(shape, self.mm_per_px * factor, (x, y), self._direction)

    def to_px(self, point: Point) -> Point:
        """Return the (x, y) pixel coordinates of a body-frame point."""
        x_px, y_px = self._origin_px
        return (
            x_px + self._direction * point[0] / self.mm_per_px,
            y_px + point[1] / self.mm_per_px,
        )

    def patch(self, points: Sequence[Point], margin_mm: float) -> Patch | None:
        """Return the window around `points`, or None if it lies outside the raster."""
        x_px, y_px = np.array([self.to_px(point) for point in points]).T
        margin_px = margin_mm / self.mm_per_px + 1
        n_rows, n_columns = self.values.shape
        top, bottom = _span(y_px, margin_px, n_rows)
        left, right = _span(x_px, margin_px, n_columns)
        if top >= bottom or left >= right:
            return None
        return self._window(slice(top, bottom), slice(left, right))

    def whole(self) -> Patch:
        """Return the window that is the whole raster."""
        rows, columns = self.values.shape
        return self._window(slice(0, rows), slice(0, columns))

    def add(self, patch: Patch, values: np.ndarray) -> None:
        """Add `values` to the window."""
        self.values[patch.rows, patch.columns] += values

    def _window(self, rows: slice, columns: slice) -> Patch:
        x_px, y_px = np.arange(columns.start, columns.stop), np.arange(rows.start, rows.stop)
        x_mm = self._direction * (x_px - self._origin_px[0]) * self.mm_per_px
        y_mm = (y_px - self._origin_px[1]) * self.mm_per_px
        return Patch(
            rows, columns, x_mm.astype(np.float32)[None, :], y_mm.astype(np.float32)[:, None]
        )


def _span(at_px: np.ndarray, margin_px: float, n: int) -> tuple[int, int]:
    low, high = int(at_px.min() - margin_px), int(np.ceil(at_px.max() + margin_px))
    return max(low, 0), min(high + 1, n)


def capsule_depth(patch: Patch, start: Point, end: Point, radii: Point) -> np.ndarray:
    """Return the depth in a rod from `start` to `end` whose radius changes as `radii`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    x, y = patch.x_mm - np.float32(start[0]), patch.y_mm - np.float32(start[1])
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
    distance = np.hypot(x - along * dx, y - along * dy)
    return np.asarray(radii[0] + (radii[1] - radii[0]) * along - distance, np.float32)


def ellipse_depth(patch: Patch, centre: Point, semi_axes: Point, angle: float) -> np.ndarray:
    """Return about the depth in an ellipse turned by `angle` (exact for a circle)."""
    u, v = local_axes(patch, centre, angle)
    radius = np.sqrt((u / semi_axes[0]) ** 2 + (v / semi_axes[1]) ** 2)
    return np.asarray((1 - radius) * min(semi_axes), np.float32)


def local_axes(patch: Patch, centre: Point, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates (anterior, up) along axes that are inclined by `angle`."""
    sin, cos = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    x, y = patch.x_mm - np.float32(centre[0]), patch.y_mm - np.float32(centre[1])
    return x * cos + y * sin, x * sin - y * cos


def path_depth(
    canvas: Canvas, points: Sequence[Point], radii_mm: Sequence[float], margin_mm: float
) -> tuple[Patch, np.ndarray] | None:
    """Return the window and depth of a tube along `points`; each piece touches its own part."""
    whole = canvas.patch(points, max(radii_mm) + margin_mm)
    if whole is None:
        return None
    depth = np.full((whole.y_mm.size, whole.x_mm.size), -margin_mm, np.float32)
    for i in range(len(points) - 1):
        pair = (points[i], points[i + 1])
        part = canvas.patch(pair, max(radii_mm[i : i + 2]) + margin_mm)
        if part is None:
            continue
        top, left = part.rows.start - whole.rows.start, part.columns.start - whole.columns.start
        view = depth[top : top + part.y_mm.size, left : left + part.x_mm.size]
        piece = capsule_depth(part, *pair, (radii_mm[i], radii_mm[i + 1]))
        np.maximum(view, piece, out=view)
    return whole, depth


def inside(depth: np.ndarray, blur_mm: float) -> np.ndarray:
    """Return how much of each pixel is inside, 0..1, for an edge blurred over `blur_mm`."""
    t = np.clip(depth / (2 * blur_mm) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def shell(depth: np.ndarray, thickness_mm: float) -> np.ndarray:
    """Return the brightness, 0..1, of a cortex `thickness_mm` thick just inside the outline.

    Seen along it a cortex is brightest at the outline and fades inwards slower than outwards.
    """
    t = (depth - 0.5 * thickness_mm) / np.where(depth > 0.5 * thickness_mm, 1.4, 0.6) / thickness_mm
    return np.asarray(np.exp(-t * t), np.float32)


def ripple(shape: tuple[int, ...], step_px: float, rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise, standard deviation about 0.7, that varies over about `step_px`."""
    rows, columns = (max(2, round(n / max(step_px, 1.0)) + 1) for n in shape)
    knots = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    smooth = knots.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32)
