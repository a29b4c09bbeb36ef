"""Vertebrae and sacrum of a synthetic radiograph, drawn at the image's full resolution."""

import numpy as np
from scipy.ndimage import gaussian_filter

from umtrain.data.synthetic.radiograph_anatomy import Anatomy, Vertebra, offset
from umtrain.data.synthetic.radiograph_canvas import (
    Canvas,
    Patch,
    Point,
    capsule_depth,
    ellipse_depth,
    inside,
    local_axes,
    path_depth,
    ripple,
    shell,
)

EDGE_MM = 0.45  # the focal spot and the patient's breathing blur every edge by about this much


def paint_spine(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add the sacrum and all vertebrae to `canvas`, as brightness."""
    _paint_sacrum(canvas, anatomy, rng)
    beam_y_mm = anatomy.vertebra("T10").y_mm
    for vertebra in anatomy.vertebrae:
        parallax_mm = 0.4 + 0.007 * abs(vertebra.y_mm - beam_y_mm)
        _paint_body(canvas, vertebra, parallax_mm, rng)
        _paint_arch(canvas, vertebra, rng)
        if rng.random() < 0.15:
            _paint_osteophyte(canvas, vertebra, rng)
    _paint_atlas_and_dens(canvas, anatomy, rng)
    canvas.values *= anatomy.bone_density


def _paint_body(
    canvas: Canvas, vertebra: Vertebra, parallax_mm: float, rng: np.random.Generator
) -> None:
    """Add one body: a rounded block with hollow endplates, a waist and a bright cortex.

    The beam meets the endplates obliquely, so the far rim shows as a second, fainter line
    `parallax_mm` inside the first at both ends: the centre stays where it is.
    """
    half_mm = 0.5 * np.hypot(vertebra.depth_mm, vertebra.height_mm)
    patch = canvas.patch([(vertebra.x_mm, vertebra.y_mm)], half_mm * 1.2 + 4)
    if patch is None:
        return
    p, q = local_axes(patch, (vertebra.x_mm, vertebra.y_mm), vertebra.inclination)
    depth = body_depth(vertebra, p, q)
    depth += 0.22 * ripple(depth.shape, 4.0 / canvas.mm_per_px, rng)
    texture = 1 + 0.3 * _trabeculae(depth.shape, canvas.mm_per_px, rng)
    texture += 0.18 * ripple(depth.shape, 6.0 / canvas.mm_per_px, rng)
    fill = inside(depth, EDGE_MM)
    cortex = np.clip(1 + 0.35 * ripple(depth.shape, 5.0 / canvas.mm_per_px, rng), 0.2, 2)
    endplate = 0.75 + 0.35 * np.clip(np.abs(q) / vertebra.height_mm * 4 - 1, 0, 1)
    rim = vertebra.height_mm / 2 - np.abs(q) - parallax_mm - 0.05 * vertebra.height_mm
    far_rim = np.exp(-((rim / 0.8) ** 2)) * fill
    bright = 0.085 * fill * texture + 0.105 * shell(depth, 0.9) * cortex * endplate
    canvas.add(patch, bright + 0.035 * far_rim * cortex)


def _paint_osteophyte(canvas: Canvas, vertebra: Vertebra, rng: np.random.Generator) -> None:
    """Add a beak of bone at an anterior corner."""
    end = float(rng.choice([-1.0, 1.0])) * vertebra.height_mm
    length = rng.uniform(2, 6)
    root = vertebra.point(vertebra.depth_mm / 2 - 3, 0.40 * end)
    tip = vertebra.point(vertebra.depth_mm / 2 + length, 0.5 * end)
    patch = canvas.patch((root, tip), 5)
    if patch is not None:
        depth = capsule_depth(patch, root, tip, (2.4, 0.7))
        canvas.add(patch, 0.08 * inside(depth, 1.2))


def body_depth(vertebra: Vertebra, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the depth in a vertebral body at (anterior `p`, up `q`) mm from its centre."""
    half_depth, half_height = vertebra.depth_mm / 2, vertebra.height_mm / 2
    t = np.clip(p / half_depth, -1.2, 1.2)
    hollow = 0.06 if vertebra.region == "C" else 0.075
    reach = half_height * (1 + 0.5 * vertebra.wedge * t - hollow * (1 - t * t))
    s = np.clip(q / half_height, -1.2, 1.2)
    waist = half_depth * (1 - 0.07 * (1 - s * s))
    return rounded(reach - np.abs(q), waist - np.abs(p), 0.13 * vertebra.height_mm)


def rounded(a: np.ndarray, b: np.ndarray, radius_mm: float) -> np.ndarray:
    """Return the depth in the intersection of two depths, its corners rounded."""
    corner = radius_mm - np.hypot(np.maximum(radius_mm - a, 0), np.maximum(radius_mm - b, 0))
    return np.asarray(np.minimum(np.minimum(a, b), corner))


def _trabeculae(shape: tuple[int, ...], mm_per_px: float, rng: np.random.Generator) -> np.ndarray:
    noise = gaussian_filter(
        rng.standard_normal(shape, np.float32), (1.6 / mm_per_px, 0.45 / mm_per_px)
    )
    return np.asarray(np.clip(noise / max(float(noise.std()), 1e-6) * 0.25, -1, 1))


def _paint_rod(
    canvas: Canvas,
    start: Point,
    end: Point,
    radii: Point,
    fill: float,
    rng: np.random.Generator,
) -> None:
    """Add a process: a rod of bone with an uneven surface and a patchy cortex."""
    patch = canvas.patch((start, end), max(radii) + 3)
    if patch is None:
        return
    depth = capsule_depth(patch, start, end, radii)
    depth += 0.13 * max(radii) * ripple(depth.shape, 5.0 / canvas.mm_per_px, rng)
    cortex = np.clip(0.65 + 0.5 * ripple(depth.shape, 6.0 / canvas.mm_per_px, rng), 0.05, 1.6)
    canvas.add(patch, fill * (0.65 * inside(depth, 0.8) + 0.75 * cortex * shell(depth, 0.9)))


# Rods of the arch, by region: start (anterior mm from the posterior wall, up in heights), end
# likewise, radii in mm, brightness.
_ARCHES = {
    "L": (
        ((1.0, 0.18), (-9.0, 0.22), (6.0, 6.5), 0.085),
        ((-9.0, 0.25), (-13.0, 0.72), (5.5, 4.5), 0.085),
        ((-11.0, 0.2), (-17.0, -0.58), (4.5, 5.5), 0.085),
        ((-13.0, 0.0), (-24.0, -0.1), (4.5, 6.0), 0.05),
    ),
    "T": (
        ((1.0, 0.25), (-7.0, 0.28), (4.0, 4.2), 0.08),
        ((-7.0, 0.55), (-10.0, -0.5), (4.0, 3.5), 0.07),
    ),
    "C": (
        ((-1.0, 0.05), (-6.0, 0.05), (3.5, 4.0), 0.07),
        ((-5.0, 0.55), (-9.0, -0.6), (4.6, 4.4), 0.10),
        ((-10.0, 0.05), (-16.0, -0.15), (3.4, 3.4), 0.07),
    ),
}


def _paint_arch(canvas: Canvas, vertebra: Vertebra, rng: np.random.Generator) -> None:
    """Add pedicles, articular processes and the spinous process behind the body."""
    back, high = -vertebra.depth_mm / 2, vertebra.height_mm
    for (start_mm, start_up), (end_mm, end_up), radii, fill in _ARCHES[vertebra.region]:
        start = vertebra.point(back + start_mm, start_up * high)
        end = vertebra.point(back + end_mm, end_up * high)
        _paint_rod(canvas, start, end, radii, fill, rng)
    root_mm, tip_mm, fall_mm, radii = _spinous_process(vertebra)
    tip_mm, fall_mm = tip_mm * rng.normal(1, 0.06), fall_mm * rng.normal(1, 0.12)
    root, tip = vertebra.point(back - root_mm, -2.0), vertebra.point(back - tip_mm, -fall_mm)
    _paint_rod(canvas, root, tip, radii, 0.05 if vertebra.region == "T" else 0.075, rng)


def _spinous_process(vertebra: Vertebra) -> tuple[float, float, float, Point]:
    """Return root and tip behind the posterior wall, the fall between (mm), and the radii.

    C7 has the longest one of the neck, by which readers know it.
    """
    if vertebra.region == "L":
        return 24.0, 46.0 * vertebra.depth_mm / 34, 0.3 * vertebra.height_mm, (6.5, 9.0)
    if vertebra.region == "T":
        number = int(vertebra.level[1:])
        fall = float(np.interp(number, [1, 3, 6, 9, 12], [14, 22, 34, 34, 14]))
        return 13.0, 40.0, fall, (4.0, 3.4)
    length = {"C7": 46.0, "C6": 38.0, "C2": 34.0}.get(vertebra.level, 28.0)
    fall = {"C7": 15.0, "C6": 13.0}.get(vertebra.level, 9.0)
    return 15.0, length, fall, (3.2, 4.2)


def _paint_atlas_and_dens(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    at = anatomy.vertebra("C2").point
    _paint_rod(canvas, at(0.5, 6), at(-1.5, 25), (6.5, 4.5), 0.09, rng)
    _paint_rod(canvas, at(7.5, 19), at(8, 23), (3.5, 3.5), 0.14, rng)
    _paint_rod(canvas, at(-24, 20), at(-40, 16), (3.5, 4.2), 0.12, rng)


def _paint_sacrum(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add the sacrum: five fused, tapering pieces; the upper edge of the first is S1's endplate."""
    scale, depth_mm = anatomy.scale, anatomy.sacrum_depth_mm
    for number, outline in enumerate(sacral_outlines(anatomy)):
        _paint_sacral_piece(canvas, outline, _SACRAL_CORTEX[number], rng)
    crest = [
        offset((0.0, 0.0), anatomy.sacral_slope, -depth_mm / 2 - behind * scale, -down * scale)
        for behind, down in ((12, 4), (17, 24), (13, 50), (9, 72))
    ]
    wings = offset((0.0, 0.0), anatomy.sacral_slope, -4 * scale, -24 * scale)
    patch = canvas.patch([wings], 44)
    if patch is not None:  # the wings of the sacrum and the joints with the ilium, seen end-on
        depth = ellipse_depth(patch, wings, (20 * scale, 30 * scale), anatomy.sacral_slope - 0.3)
        depth += 3.0 * ripple(depth.shape, 12.0 / canvas.mm_per_px, rng)
        canvas.add(patch, 0.05 * inside(depth, 9.0) + 0.02 * shell(depth, 1.5))
    tube = path_depth(canvas, crest, [6.5, 7.0, 6.0, 3.0], 3)
    if tube is not None:
        patch, depth = tube
        depth += 1.2 * ripple(depth.shape, 7.0 / canvas.mm_per_px, rng)
        canvas.add(patch, 0.035 * inside(depth, 1.2) + 0.03 * shell(depth, 1.4))


# Brightness of the cortex of S1 to S5 along its upper, anterior, lower and posterior edge; what is
# left of the discs between fused pieces is faint.
_SACRAL_CORTEX = (
    (0.14, 0.10, 0.05, 0.09),
    (0.0, 0.07, 0.03, 0.06),
    (0.0, 0.05, 0.02, 0.05),
    (0.0, 0.04, 0.0, 0.04),
    (0.0, 0.03, 0.02, 0.03),
)


def _paint_sacral_piece(
    canvas: Canvas,
    outline: list[Point],
    cortex: tuple[float, ...],
    rng: np.random.Generator,
) -> None:
    patch = canvas.patch(outline, 4)
    if patch is None:
        return
    edges = [_edge_depth(patch, outline[i], outline[(i + 1) % 4]) for i in range(4)]
    depth = np.minimum.reduce(edges)
    for wall in (edges[1], edges[3]):
        depth = np.minimum(depth, rounded(edges[0], wall, 1.6))
    texture = 1 + 0.25 * _trabeculae(depth.shape, canvas.mm_per_px, rng)
    texture += 0.25 * ripple(depth.shape, 8.0 / canvas.mm_per_px, rng)
    bright = 0.085 * inside(depth, EDGE_MM) * texture
    near = inside(depth + 0.8, 0.8)
    patchy = np.clip(1 + 0.3 * ripple(depth.shape, 7.0 / canvas.mm_per_px, rng), 0.3, 2)
    for edge, strength in zip(edges, cortex, strict=True):
        if strength > 0:
            bright += strength * shell(edge, 1.0) * near * patchy
    canvas.add(patch, bright)


def _edge_depth(patch: Patch, start: Point, end: Point) -> np.ndarray:
    """Return the distance to the right of the line from `start` to `end` (y grows downwards)."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    distance = dx * (patch.y_mm - start[1]) - dy * (patch.x_mm - start[0])
    return np.asarray(distance / np.hypot(dx, dy), np.float32)


def sacral_outlines(anatomy: Anatomy) -> list[list[Point]]:
    """Return S1 to S5 as corners, clockwise from the posterior superior one.

    Each turns further backwards, and is smaller, than the one above.
    """
    scale, outlines = anatomy.scale, []
    middle, inclination = (0.0, 0.0), anatomy.sacral_slope
    depth_mm = anatomy.sacrum_depth_mm
    sizes = ((30, 0.72, 4), (25, 0.76, 10), (21, 0.76, 14), (18, 0.78, 16), (15, 0.6, 18))
    for height, taper, turn_deg in sizes:
        below = inclination - np.radians(turn_deg)
        bottom = offset(middle, (inclination + below) / 2, -0.06 * depth_mm, -height * scale)
        lower_mm = depth_mm * taper
        outlines.append(
            [
                offset(middle, inclination, -depth_mm / 2, 0.0),
                offset(middle, inclination, depth_mm / 2, 0.0),
                offset(bottom, below, lower_mm / 2, 0.0),
                offset(bottom, below, -lower_mm / 2, 0.0),
            ]
        )
        middle, inclination, depth_mm = bottom, below, lower_mm
    return outlines
