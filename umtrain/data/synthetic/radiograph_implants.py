"""Metal in a synthetic radiograph: spinal fusion, a cervical plate, a hip prosthesis."""

from collections.abc import Callable

import numpy as np

from umtrain.data.synthetic.radiograph_anatomy import Anatomy, Vertebra
from umtrain.data.synthetic.radiograph_canvas import (
    Canvas,
    Point,
    capsule_depth,
    ellipse_depth,
    inside,
    path_depth,
)

_METAL = 0.9  # brighter than any bone: it saturates the film


def paint_fusion(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add pedicle screws and two rods over three to nine levels, down to L5 or the sacrum."""
    n_levels = int(rng.integers(3, 10))
    first = int(rng.integers(0, 5))
    fused = anatomy.vertebrae[first : first + n_levels]
    for shift_mm in (0.0, float(rng.uniform(1.5, 5))):
        rod = [v.point(-v.depth_mm / 2 - 17, 0.15 * v.height_mm + shift_mm) for v in fused]
        if first == 0:
            rod.insert(0, (anatomy.s1_corner_mm[0] - 12, anatomy.s1_corner_mm[1] + 6 + shift_mm))
        tube = path_depth(canvas, rod, [2.75] * len(rod), 2)
        if tube is not None:
            canvas.add(tube[0], _METAL * inside(tube[1], 0.4))
        for vertebra in fused:
            _paint_pedicle_screw(canvas, vertebra, shift_mm, rng)


def paint_cervical_plate(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add an anterior plate from C5 to C7 with a screw in each body."""
    fused = [anatomy.vertebra(level) for level in ("C7", "C6", "C5")]
    plate = [v.point(v.depth_mm / 2 + 1.6, 0.0) for v in fused]
    tube = path_depth(canvas, plate, [1.4] * 3, 2)
    if tube is not None:
        canvas.add(tube[0], _METAL * inside(tube[1], 0.4))
    for vertebra in fused:
        tip = vertebra.point(vertebra.depth_mm / 2 - rng.uniform(11, 14), rng.normal(0, 1))
        _paint_rod(canvas, vertebra.point(vertebra.depth_mm / 2 + 1, 0.0), tip, 1.5)


def paint_hip_prosthesis(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add the cup, ball and stem of a total hip replacement."""
    x, y = anatomy.hip_x_mm + float(rng.normal(0, 3)), anatomy.hip_y_mm
    patch = canvas.patch([(x, y)], 30)
    if patch is not None:
        canvas.add(patch, 0.6 * inside(ellipse_depth(patch, (x, y), (25.0, 25.0), 0.0), 0.5))
    _paint_rod(canvas, (x - 4, y + 8), (x + 2, y + 150), 7.5)


IMPLANTS: dict[str, Callable[[Canvas, Anatomy, np.random.Generator], None]] = {
    "fusion": paint_fusion,
    "cervical_plate": paint_cervical_plate,
    "hip_prosthesis": paint_hip_prosthesis,
}


def _paint_pedicle_screw(
    canvas: Canvas, vertebra: Vertebra, shift_mm: float, rng: np.random.Generator
) -> None:
    back, up_mm = -vertebra.depth_mm / 2, 0.2 * vertebra.height_mm + shift_mm
    head = vertebra.point(back - 18, up_mm)
    tip = vertebra.point(vertebra.depth_mm * rng.uniform(0.22, 0.36), up_mm - rng.uniform(0, 5))
    _paint_rod(canvas, head, tip, 2.9)
    _paint_rod(canvas, head, vertebra.point(back - 13, up_mm), 5.0)


def _paint_rod(canvas: Canvas, start: Point, end: Point, radius_mm: float) -> None:
    patch = canvas.patch((start, end), radius_mm + 2)
    if patch is not None:
        depth = capsule_depth(patch, start, end, (radius_mm, radius_mm))
        canvas.add(patch, _METAL * inside(depth, 0.4))
