"""The bones around the spine of a synthetic radiograph: skull, arms, ribs, pelvis, thighs.

They overlap the column as they do on a real film, and are drawn on a coarser canvas than it.
"""

import numpy as np
from scipy.interpolate import CubicSpline

from umtrain.data.synthetic.radiograph_anatomy import Anatomy, offset
from umtrain.data.synthetic.radiograph_canvas import (
    Canvas,
    Point,
    ellipse_depth,
    inside,
    path_depth,
    shell,
)
from umtrain.data.synthetic.radiograph_soft import ArmJoints


def paint_skeleton(
    canvas: Canvas, anatomy: Anatomy, arms: list[ArmJoints], rng: np.random.Generator
) -> None:
    """Add all bones but the spine to `canvas`, as brightness."""
    _paint_skull(canvas, anatomy)
    for side in (-1, 1):
        _paint_ribs(canvas, anatomy, side, rng)
        _paint_scapula(canvas, anatomy, side, rng)
        _paint_pelvis(canvas, anatomy, side, rng)
    for arm in arms:
        _paint_arm_bones(canvas, anatomy, arm)
    _paint_sternum(canvas, anatomy)
    canvas.values *= anatomy.bone_density


def _paint_tube(
    canvas: Canvas, points: list[Point], radii_mm: list[float], fill: float, cortex: float
) -> None:
    """Add a bone along a smooth curve through `points`."""
    at = np.linspace(0, len(points) - 1, 6 * len(points))
    knots = np.arange(len(points))
    curve = [(float(x), float(y)) for x, y in CubicSpline(knots, np.array(points))(at)]
    radii = [float(radius) for radius in np.interp(at, knots, radii_mm)]
    tube = path_depth(canvas, curve, radii, 3)
    if tube is not None:
        patch, depth = tube
        canvas.add(patch, fill * inside(depth, 0.8) + cortex * shell(depth, 1.2))


def _paint_disc(
    canvas: Canvas, centre: Point, axes: Point, angle: float, fill: float, cortex: float
) -> None:
    patch = canvas.patch([centre], max(axes) + 4)
    if patch is not None:
        depth = ellipse_depth(patch, centre, axes, angle)
        canvas.add(patch, fill * inside(depth, 1.0) + cortex * shell(depth, 1.4))


def _paint_skull(canvas: Canvas, anatomy: Anatomy) -> None:
    c2, scale = anatomy.vertebra("C2"), anatomy.scale

    def at(anterior: float, up: float) -> Point:
        return (c2.x_mm + scale * anterior, c2.y_mm - scale * up)

    _paint_disc(canvas, at(6, 96), (94 * scale, 74 * scale), 0.08, 0.04, 0.16)
    _paint_disc(canvas, at(-10, 44), (17 * scale, 13 * scale), 0.5, 0.10, 0.03)
    _paint_disc(canvas, at(14, 46), (24 * scale, 9 * scale), 0.3, 0.10, 0.02)
    _paint_disc(canvas, at(-28, 40), (28 * scale, 8 * scale), -0.5, 0.06, 0.06)
    for shift in (-2.5, 2.5):
        jaw = [at(17 + shift, 34), at(15 + shift, 8), at(30 + shift, -10), at(88, -26)]
        _paint_tube(canvas, jaw, [6 * scale, 9 * scale, 9 * scale, 8 * scale], 0.06, 0.07)
    teeth = [at(44, 8), at(66, 3), at(88, -2)]
    _paint_tube(canvas, teeth, [9 * scale, 9 * scale, 8 * scale], 0.12, 0.02)
    _paint_tube(canvas, [at(40, 22), at(66, 20), at(92, 16)], [4, 4, 4], 0.06, 0.05)
    _paint_disc(canvas, at(26, -26), (9 * scale, 3 * scale), 0.4, 0.05, 0.03)


def _paint_ribs(canvas: Canvas, anatomy: Anatomy, side: int, rng: np.random.Generator) -> None:
    """Add twelve ribs of one side; the far side's are larger on the film and shifted."""
    shift_x, shift_y = rng.normal(0, 2.5, 2)
    grow = anatomy.scale * (1 + 0.03 * side)
    # Fractions from the first rib to the twelfth: how far back, down and forward each goes.
    back_mm = np.interp(range(12), [0, 3, 8, 11], [24, 40, 46, 40]) * grow
    fall_mm = np.interp(range(12), [0, 3, 7, 9, 10, 11], [34, 92, 132, 128, 92, 56]) * grow
    reach_mm = np.interp(range(12), [0, 3, 6, 9, 10, 11], [58, 118, 146, 120, 55, 5]) * grow
    for number, (back, fall, reach) in enumerate(
        zip(back_mm.tolist(), fall_mm.tolist(), reach_mm.tolist(), strict=True), start=1
    ):
        head = anatomy.vertebra(f"T{number}")
        x, y = head.point(-head.depth_mm / 2 - 3, head.height_mm * 0.35)
        x, y = x + float(shift_x), y + float(shift_y)
        points = [
            (x, y),
            (x - 0.70 * back, y + 0.03 * fall),
            (x - back, y + 0.20 * fall),
            (x - 0.60 * back, y + 0.42 * fall),
            (x + 0.25 * reach, y + 0.72 * fall),
            (x + 0.65 * reach, y + 0.94 * fall),
            (x + reach, y + 1.02 * fall),
        ]
        wide = grow * rng.uniform(4.0, 5.2)
        radii = [0.7 * wide, 0.8 * wide, wide, wide, 1.05 * wide, 1.05 * wide, 0.9 * wide]
        _paint_tube(canvas, points, radii, 0.018, 0.022)


def _paint_scapula(canvas: Canvas, anatomy: Anatomy, side: int, rng: np.random.Generator) -> None:
    scale, base = anatomy.scale, anatomy.vertebra("T5")
    x = base.x_mm + scale * (-20 + 12 * side + rng.normal(0, 10))
    y = base.y_mm + scale * rng.normal(0, 7)
    lean = rng.uniform(-0.1, 0.45)
    top, tip = offset((x, y), lean, 0, 62 * scale), offset((x, y), lean, -6 * scale, -72 * scale)
    glenoid = offset((x, y), lean, 30 * scale, 42 * scale)
    _paint_tube(canvas, [top, (x, y), tip], [5 * scale, 4 * scale, 3 * scale], 0.025, 0.045)
    _paint_tube(canvas, [glenoid, offset((x, y), lean, 14 * scale, 0), tip], [7, 5, 3], 0.03, 0.045)
    _paint_tube(
        canvas, [top, offset((x, y), lean, 16 * scale, 58 * scale), glenoid], [5, 5, 8], 0.03, 0.03
    )


def _paint_arm_bones(canvas: Canvas, anatomy: Anatomy, arm: ArmJoints) -> None:
    scale = anatomy.scale
    shoulder, elbow, hand = arm
    _paint_disc(canvas, shoulder, (23 * scale, 23 * scale), 0.0, 0.04, 0.035)
    along = np.linspace(0, 1, 4)[:, None]
    shaft = np.array(shoulder) * (1 - along) + np.array(elbow) * along
    points = [(float(x), float(y)) for x, y in shaft]
    _paint_tube(canvas, points, [15 * scale, 11 * scale, 11 * scale, 15 * scale], 0.02, 0.06)
    for spread in (-8, 8):
        start, end = (elbow[0] + spread, elbow[1]), (hand[0] + spread, hand[1])
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        _paint_tube(canvas, [start, middle, end], [8 * scale, 6 * scale, 7 * scale], 0.02, 0.035)


def _paint_sternum(canvas: Canvas, anatomy: Anatomy) -> None:
    scale = anatomy.scale
    points = [
        anatomy.vertebra(level).point(front * scale, -12)
        for level, front in (("T3", 74), ("T5", 104), ("T7", 122), ("T9", 130))
    ]
    _paint_tube(canvas, points, [7 * scale, 6 * scale, 5 * scale, 4 * scale], 0.04, 0.05)


def _paint_pelvis(canvas: Canvas, anatomy: Anatomy, side: int, rng: np.random.Generator) -> None:
    """Add one half of the pelvis with its femur: iliac wing, socket, pubis, ischium, thigh bone."""
    scale = anatomy.scale
    x = anatomy.hip_x_mm + float(rng.normal(0, 3.5)) + 3 * side
    y = anatomy.hip_y_mm + float(rng.normal(0, 3.0))
    grow = scale * (1 + 0.02 * side)
    turn = anatomy.sacral_slope - np.radians(40)

    def at(anterior: float, up: float) -> Point:
        return offset((x, y), 0.6 * turn, anterior * grow, up * grow)

    crest = [
        at(16, 22),
        at(28, 46),
        at(35, 70),
        at(30, 100),
        at(4, 128),
        at(-42, 136),
        at(-86, 118),
        at(-100, 84),
    ]
    _paint_tube(canvas, crest, [8, 5, 4, 5, 6, 6, 5, 4], 0.02, 0.045)
    column = [at(-72, 66), at(-40, 46), at(-6, 30), at(12, 14), at(26, -14), at(46, -34)]
    _paint_tube(canvas, column, [7, 9, 12, 11, 8, 8], 0.025, 0.035)
    notch = [at(-82, 70), at(-60, 44), at(-40, 22), at(-26, 0), at(-24, -34), at(-8, -56)]
    _paint_tube(canvas, notch, [5, 5, 8, 9, 9, 11], 0.03, 0.035)
    wing = at(-24, 88)
    _paint_disc(canvas, wing, (72 * grow, 46 * grow), 0.25 + turn, 0.03, 0.0)
    _paint_disc(canvas, at(0, 0), (28 * grow, 28 * grow), 0.0, 0.01, 0.035)
    _paint_disc(canvas, at(0, 0), (23.5 * grow, 23.5 * grow), 0.0, 0.045, 0.035)
    shaft = [at(-2, -6), at(-8, -30), at(-4, -80), at(2, -150), at(8, -240)]
    _paint_tube(canvas, shaft, [13 * grow, 17 * grow, 16 * grow, 15 * grow, 15 * grow], 0.03, 0.06)
