"""Soft tissue and air of a synthetic radiograph: millimetres of water along each X-ray path."""

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from umtrain.data.synthetic.radiograph_anatomy import Anatomy
from umtrain.data.synthetic.radiograph_canvas import (
    Canvas,
    Point,
    capsule_depth,
    ellipse_depth,
    inside,
    path_depth,
)

# level, distance from the vertebra to the skin behind and in front, and the width across (mm)
_OUTLINE = (
    ("C2", 52, 46, 128),
    ("C4", 50, 46, 116),
    ("C6", 56, 54, 126),
    ("T1", 68, 74, 270),
    ("T3", 72, 98, 390),
    ("T5", 70, 126, 380),
    ("T8", 66, 150, 320),
    ("T11", 66, 150, 295),
    ("L2", 70, 128, 280),
    ("L4", 76, 118, 300),
)


ArmJoints = tuple[Point, Point, Point]


def paint_soft_tissue(
    canvas: Canvas, anatomy: Anatomy, arms: list[ArmJoints], rng: np.random.Generator
) -> None:
    """Add the body, its lungs, airway and bowel gas to `canvas`."""
    behind, front, _ = _outline(anatomy, canvas.whole().y_mm[:, 0])
    body = _body(canvas, anatomy)
    lung = _lungs(canvas, anatomy, rng, behind, front)
    canvas.values += np.maximum(body - lung, 0)
    canvas.values += _head(canvas, anatomy)
    for arm in arms:
        _paint_arm(canvas, anatomy.scale, arm)
    _paint_airway(canvas, anatomy)
    _paint_bowel_gas(canvas, anatomy, rng)
    np.maximum(canvas.values, 0, out=canvas.values)


def _outline(anatomy: Anatomy, y_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the x of the skin behind and in front, and the width across, for rows at `y_mm`."""
    scale, fat = anatomy.scale, anatomy.fat_mm
    rows = []
    for level, behind, front, across in _OUTLINE:
        spine = anatomy.vertebra(level)
        belly = anatomy.belly_mm if level in ("L2", "L4") else 0.4 * fat
        grown = 0.35 * fat if level[0] == "C" else fat
        rows.append(
            (
                spine.y_mm,
                spine.x_mm - behind * scale - 0.5 * grown,
                spine.x_mm + front * scale + 0.5 * grown + belly,
                across * scale + 2 * grown,
            )
        )
    hip_x, hip_y = anatomy.hip_x_mm, anatomy.hip_y_mm
    rows.append((10.0, -88 * scale - fat, 108 * scale + 0.9 * anatomy.belly_mm, 330 * scale))
    rows.append(
        (
            hip_y,
            hip_x - 124 * scale - fat,
            hip_x + 80 * scale + 0.3 * anatomy.belly_mm,
            350 * scale + fat,
        )
    )
    rows.append((hip_y + 110, hip_x - 105 * scale - fat, hip_x + 86 * scale, 330 * scale))
    rows.append((hip_y + 260, hip_x - 88 * scale, hip_x + 82 * scale, 300 * scale))
    knots = np.array(sorted(rows))
    at = np.clip(y_mm, knots[0, 0] - 10, knots[-1, 0])
    smooth_rows = 20 / float(y_mm[1] - y_mm[0])
    behind, front, across = (
        gaussian_filter1d(PchipInterpolator(knots[:, 0], knots[:, i])(at), smooth_rows)
        for i in (1, 2, 3)
    )
    return behind, front, across


def _body(canvas: Canvas, anatomy: Anatomy) -> np.ndarray:
    """Return the path through an elliptic trunk and neck, up to the base of the skull."""
    whole = canvas.whole()
    behind, front, across = (v[:, None] for v in _outline(anatomy, whole.y_mm[:, 0]))
    t = np.clip((whole.x_mm - behind) / (front - behind), 0, 1)
    thickness = across * (4 * t * (1 - t)) ** 0.42
    c2 = anatomy.vertebra("C2")
    neck_end = np.clip((whole.y_mm - c2.y_mm + 45) / 30, 0, 1)
    return np.asarray(thickness * neck_end, np.float32)


def _head(canvas: Canvas, anatomy: Anatomy) -> np.ndarray:
    whole = canvas.whole()
    c2, scale = anatomy.vertebra("C2"), anatomy.scale
    skull = ellipse_depth(whole, c2.point(8 * scale, 88 * scale), (98 * scale, 78 * scale), 0.1)
    jaw = capsule_depth(whole, c2.point(28, 30), c2.point(92 * scale, -2), (40 * scale, 21 * scale))
    head = 150 * np.sqrt(np.clip(skull / 78, 0, 1)) + 55 * np.sqrt(np.clip(jaw / 30, 0, 1))
    return np.asarray(head, np.float32)


def _lungs(
    canvas: Canvas,
    anatomy: Anatomy,
    rng: np.random.Generator,
    behind: np.ndarray,
    front: np.ndarray,
) -> np.ndarray:
    """Return how much water the air of both lungs takes away, less their vessels and the heart."""
    whole, scale = canvas.whole(), anatomy.scale
    top_mm = anatomy.vertebra("T2").y_mm
    air = np.zeros(canvas.values.shape, np.float32)
    wall_behind = behind[:, None] + (30 + 0.8 * anatomy.fat_mm) * scale
    wall_front = front[:, None] - (20 + 0.7 * anatomy.fat_mm) * scale
    chest = np.minimum(whole.x_mm - wall_behind, wall_front - whole.x_mm)
    for _ in range(2):
        dome = anatomy.vertebra("T11").point(78 * scale, rng.uniform(2, 24))
        drop = (whole.x_mm - dome[0]) / (95 * scale)
        floor_mm = dome[1] + 62 * scale * np.where(drop < 0, 1.0, 0.35) * drop**2
        depth = np.minimum(np.minimum(floor_mm - whole.y_mm, whole.y_mm - top_mm) * 2.5, chest)
        air += 125 * scale * np.sqrt(np.clip(depth / 60, 0, 1)) * inside(depth, 1.0)
    heart = ellipse_depth(
        whole, anatomy.vertebra("T8").point(95 * scale, -8), (46 * scale, 58 * scale), 0.5
    )
    air *= 1 - 0.45 * np.sqrt(np.clip(heart / 46, 0, 1))
    return air * (0.78 + 0.35 * _vessels(canvas, rng))


def _vessels(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Return lung markings: noise with ridges, about -1..1, at the scale of vessels."""
    noise = rng.standard_normal(canvas.values.shape, np.float32)
    fine = gaussian_filter(noise, 2.4 / canvas.mm_per_px, truncate=3)
    ridges = -np.abs(fine / fine.std()) + 0.8
    return np.asarray(np.clip(gaussian_filter(ridges, 0.8 / canvas.mm_per_px) * 0.4, -1, 1))


def _paint_arm(canvas: Canvas, scale: float, arm: ArmJoints) -> None:
    shoulder, elbow, hand = arm
    tube = path_depth(canvas, (shoulder, elbow), (52 * scale, 40 * scale), 2)
    if tube is not None:
        canvas.add(tube[0], 70 * scale * np.sqrt(np.clip(tube[1] / 46, 0, 1)))
    tube = path_depth(canvas, (elbow, hand), (38 * scale, 26 * scale), 2)
    if tube is not None:
        canvas.add(tube[0], 55 * scale * np.sqrt(np.clip(tube[1] / 34, 0, 1)))


def raise_arms(anatomy: Anatomy, rng: np.random.Generator) -> list[ArmJoints]:
    """Return shoulder, elbow and hand of both arms; the hands rest near the collar bones."""
    raise_rad = np.radians(rng.uniform(30, 65))
    return [_arm_joints(anatomy, rng, side, raise_rad) for side in (-1, 1)]


def _arm_joints(
    anatomy: Anatomy, rng: np.random.Generator, side: int, raise_rad: float
) -> ArmJoints:
    scale = anatomy.scale
    base = anatomy.vertebra("T3")
    shoulder = (base.x_mm + 22 * scale + 9 * side, base.y_mm - 4 * scale + rng.normal(0, 6))
    raise_rad += rng.normal(0, 0.07)
    reach = 285 * scale
    elbow = (
        float(shoulder[0] + reach * np.sin(raise_rad)),
        float(shoulder[1] + reach * np.cos(raise_rad)),
    )
    hand = (shoulder[0] + 118 * scale + rng.normal(0, 8), shoulder[1] - 34 * scale)
    return shoulder, elbow, hand


def _paint_airway(canvas: Canvas, anatomy: Anatomy) -> None:
    """Take away the air of pharynx, larynx and trachea, in front of the column."""
    scale = anatomy.scale
    path = [
        anatomy.vertebra(level).point(front * scale, 0)
        for level, front in (("C2", 22), ("C4", 24), ("C6", 34), ("T1", 42), ("T3", 46), ("T5", 44))
    ]
    tube = path_depth(canvas, path, [w * scale for w in (9, 8, 8, 9, 9, 8)], 3)
    if tube is not None:
        canvas.add(tube[0], -20 * scale * np.sqrt(np.clip(tube[1] / 8, 0, 1)))


def _paint_bowel_gas(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(6, 18))):
        level = anatomy.vertebra(str(rng.choice(["L1", "L2", "L3", "L4", "L5"])))
        at = (
            level.x_mm + anatomy.scale * rng.uniform(30, 125) + 0.4 * anatomy.belly_mm,
            level.y_mm + rng.uniform(-20, 60),
        )
        axes = (float(rng.uniform(6, 20)), float(rng.uniform(5, 13)))
        patch = canvas.patch([at], max(axes) + 2)
        if patch is None:
            continue
        depth = ellipse_depth(patch, at, axes, rng.uniform(-1.5, 1.5))
        canvas.add(patch, -4.5 * min(axes) * np.sqrt(np.clip(depth / min(axes), 0, 1)))
