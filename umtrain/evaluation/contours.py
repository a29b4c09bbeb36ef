"""Where a map lies on the image it was made from, and its contours as annotations for QuPath.

Frames: `_px` is pixels of the square that the network saw, a pixel covering [i, i + 1) on each
axis; `l0` is pixels of the slide's level 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates

Floats = NDArray[np.float64]
Offsets = NDArray[np.uint32]
ToL0 = Callable[[float, float], tuple[float, float]]
Ring = list[list[float]]

_L0_DIGITS = 2  # as QuPath writes them


class Area(NamedTuple):
    """A part of the image, in pixels: what of it the slide fills, say."""

    left_px: float
    top_px: float
    right_px: float
    bottom_px: float


@dataclass(frozen=True)
class MapGrid:
    """Where a map's positions lie: that of row r and column c is centred on y(r) and x(c).

    x(c) = first_x_px + c * stride_px, and y(r) likewise. For values of patches of p pixels side by
    side, the first at the corner of the image, these are p / 2, p / 2 and p.
    """

    first_x_px: float
    first_y_px: float
    stride_px: float

    def x_px(self, n_columns: int) -> Floats:
        """Return the centres of the first `n_columns` columns."""
        return self.first_x_px + self.stride_px * np.arange(n_columns, dtype=np.float64)

    def y_px(self, n_rows: int) -> Floats:
        """Return the centres of the first `n_rows` rows."""
        return self.first_y_px + self.stride_px * np.arange(n_rows, dtype=np.float64)

    def sample(self, values: ArrayLike, x_px: ArrayLike, y_px: ArrayLike) -> Floats:
        """Return the map `values` (h, w) at each of `x_px` and `y_px`: (len(y_px), len(x_px)).

        Linear between the centres; beyond the outermost ones it goes on as it is there.
        """
        rows = (np.asarray(y_px, dtype=np.float64) - self.first_y_px) / self.stride_px
        columns = (np.asarray(x_px, dtype=np.float64) - self.first_x_px) / self.stride_px
        field = np.asarray(values, dtype=np.float64)
        places = np.meshgrid(rows, columns, indexing="ij")
        sampled: Floats = map_coordinates(field, places, order=1, mode="nearest")
        return sampled

    def raster(self, values: ArrayLike, side_px: int, n_shown: int) -> Floats:
        """Return the map over the whole image of `side_px` pixels as a picture of `n_shown`."""
        at_px = (np.arange(n_shown) + 0.5) * (side_px / n_shown)
        return self.sample(values, at_px, at_px)


@dataclass(frozen=True)
class Level:
    """A value above 0 to draw a contour at; the class and colour (RGB, 0..255) that it gets."""

    value: float
    name: str
    colour: tuple[int, int, int]


def contour_collection(
    values: ArrayLike, grid: MapGrid, area: Area, levels: Sequence[Level], to_l0: ToL0
) -> dict[str, Any]:
    """Return where the map `values` (h, w) is at least as large as each level, as GeoJSON.

    A FeatureCollection as QuPath 0.4 and later imports it: one annotation a region, a polygon with
    its holes in level-0 pixels, largest first, levels in the order given. It ends at the border of
    `area`. A map below all levels has no features. Raises ValueError for a level that is not
    above 0.
    """
    field = np.asarray(values, dtype=np.float64)
    x_px = _axis(grid.x_px(field.shape[1]), area.left_px, area.right_px)
    y_px = _axis(grid.y_px(field.shape[0]), area.top_px, area.bottom_px)
    inside = grid.sample(field, x_px, y_px)
    # Nothing lies beyond the border, at no distance from it: so contours close on the border.
    generator = contour_generator(
        x=np.pad(x_px, 1, mode="edge"),
        y=np.pad(y_px, 1, mode="edge"),
        z=np.pad(inside, 1),
        fill_type=FillType.OuterOffset,
    )
    features: list[dict[str, Any]] = []
    for level in levels:
        if not level.value > 0:
            raise ValueError(f"a contour needs a level above 0; got {level.value}")
        filled = generator.filled(level.value, np.inf)
        points, offsets = cast(tuple[list[Floats], list[Offsets]], filled)  # by the fill_type
        polygons = [_polygon(*pair, to_l0) for pair in zip(points, offsets, strict=True)]
        found = sorted((p for p in polygons if p), key=lambda p: _area(p[0]), reverse=True)
        features += [_feature(polygon, level) for polygon in found]
    return {"type": "FeatureCollection", "features": features}


def _axis(centres_px: Floats, low_px: float, high_px: float) -> Floats:
    """Return where one axis of a map is looked at: its centres inside, and both borders."""
    inside = centres_px[(centres_px > low_px) & (centres_px < high_px)]
    return np.concatenate([[low_px], inside, [high_px]])


def _polygon(points: Floats, offsets: Offsets, to_l0: ToL0) -> list[Ring]:
    """Return the outer ring and its holes; empty if there is no area in it."""
    rings = [_ring(part, to_l0) for part in np.split(points, offsets[1:-1].astype(int))]
    if _area(rings[0]) == 0:
        return []
    return [ring for ring in rings if _area(ring) > 0]


def _ring(points: Floats, to_l0: ToL0) -> Ring:
    """Return a closed ring in level-0 pixels, no point twice in a row."""
    ring: Ring = []
    for x_px, y_px in points.tolist():
        point = [round(float(at), _L0_DIGITS) for at in to_l0(x_px, y_px)]
        if not ring or point != ring[-1]:
            ring.append(point)
    return ring


def _area(ring: Ring) -> float:
    x, y = np.array(ring).T
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)


def _feature(polygon: list[Ring], level: Level) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": polygon},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": level.name, "color": list(level.colour)},
        },
    }
