"""Where everything is in one synthetic patient: a spine in the sagittal plane, in millimetres.

Body frame: the origin is the middle of the S1 endplate, x grows anteriorly, y grows caudally. An
inclination is the angle, in radians, by which an upward axis leans anteriorly.

Sizes and angles are near the adult means of the literature on sagittal alignment (lumbar lordosis
about 55°, thoracic kyphosis about 40°, sacral slope about 40°), varied from patient to patient.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

# level, depth and height of the body, height of the disc below it (mm), wedge (positive: the
# anterior wall is the higher one, as a fraction of the height)
_LEVELS = (
    ("L5", 35.5, 26.5, 9.5, 0.13),
    ("L4", 35.5, 27.0, 10.5, 0.05),
    ("L3", 35.0, 27.5, 10.0, 0.02),
    ("L2", 34.5, 27.0, 9.0, 0.0),
    ("L1", 34.0, 26.0, 8.0, -0.04),
    ("T12", 33.0, 24.5, 6.5, -0.05),
    ("T11", 32.0, 23.0, 5.5, -0.05),
    ("T10", 31.0, 22.0, 5.0, -0.04),
    ("T9", 29.5, 21.0, 4.5, -0.04),
    ("T8", 28.0, 20.3, 4.2, -0.05),
    ("T7", 26.8, 19.6, 4.0, -0.06),
    ("T6", 25.3, 19.0, 3.8, -0.06),
    ("T5", 23.8, 18.5, 3.6, -0.05),
    ("T4", 22.3, 18.0, 3.5, -0.04),
    ("T3", 20.8, 17.5, 3.5, -0.03),
    ("T2", 19.6, 16.8, 3.8, -0.02),
    ("T1", 18.6, 16.0, 4.4, -0.02),
    ("C7", 17.8, 14.3, 4.8, -0.03),
    ("C6", 17.3, 12.9, 5.2, -0.04),
    ("C5", 16.9, 12.7, 5.2, -0.03),
    ("C4", 16.5, 13.0, 5.0, -0.02),
    ("C3", 16.2, 13.4, 4.8, 0.0),
    ("C2", 16.0, 19.0, 4.6, 0.0),
)
_C7 = [row[0] for row in _LEVELS].index("C7")


@dataclass(frozen=True)
class Vertebra:
    """One vertebral body: its centre and size in mm, its inclination, and its wedge."""

    level: str
    x_mm: float
    y_mm: float
    inclination: float
    depth_mm: float
    height_mm: float
    wedge: float

    @property
    def region(self) -> str:
        """C, T or L."""
        return self.level[0]

    def point(self, anterior_mm: float, up_mm: float) -> tuple[float, float]:
        """Return the body-frame position of a point given along the vertebra's own axes."""
        return offset((self.x_mm, self.y_mm), self.inclination, anterior_mm, up_mm)


@dataclass(frozen=True)
class Anatomy:
    """One patient standing: the column from L5 up to C2, the pelvis, and how wide things are."""

    scale: float
    sacral_slope: float
    sacrum_depth_mm: float
    vertebrae: tuple[Vertebra, ...]
    hip_x_mm: float
    hip_y_mm: float
    belly_mm: float
    fat_mm: float
    bone_density: float

    def vertebra(self, level: str) -> Vertebra:
        """Return the vertebra called `level`, for example "C7"."""
        return next(v for v in self.vertebrae if v.level == level)

    @property
    def s1_corner_mm(self) -> tuple[float, float]:
        """The posterior superior corner of the sacrum, in the body frame."""
        return offset((0.0, 0.0), self.sacral_slope, -self.sacrum_depth_mm / 2, 0.0)

    @property
    def c7_centre_mm(self) -> tuple[float, float]:
        """The centre of the C7 vertebral body, in the body frame."""
        c7 = self.vertebra("C7")
        return (c7.x_mm, c7.y_mm)


def offset(
    origin: tuple[float, float], inclination: float, anterior_mm: float, up_mm: float
) -> tuple[float, float]:
    """Return `origin` moved along the axes of something inclined by `inclination`."""
    sin, cos = np.sin(inclination), np.cos(inclination)
    return (
        float(origin[0] + anterior_mm * cos + up_mm * sin),
        float(origin[1] + anterior_mm * sin - up_mm * cos),
    )


def grow_anatomy(patient_seed: int, pose_seed: int) -> Anatomy:
    """Return the patient `patient_seed` (sizes) standing as `pose_seed` says (curves, SVA)."""
    body = np.random.default_rng([patient_seed, 1])
    pose = np.random.default_rng([pose_seed, 2])
    scale = float(np.clip(body.normal(0.98, 0.055), 0.86, 1.09))
    slope = float(np.radians(np.clip(pose.normal(39, 8), 18, 58)))
    sizes = _level_sizes(body, scale)
    inclinations = _inclinations(pose, slope, len(_LEVELS))
    target_sva_mm = float(np.clip(pose.normal(22, 38), -60, 120))
    sacrum_depth_mm = scale * float(body.normal(34, 1.5))
    corner_x_mm = -sacrum_depth_mm / 2 * np.cos(slope)
    lean = _solve_lean(sizes, inclinations, slope, target_sva_mm + corner_x_mm)
    tilt = np.radians(body.normal(13, 5)) + 0.3 * lean
    reach = scale * body.normal(108, 6)
    return Anatomy(
        scale=scale,
        sacral_slope=slope,
        sacrum_depth_mm=sacrum_depth_mm,
        vertebrae=_stack(sizes, inclinations + lean * _ramp(), slope),
        hip_x_mm=float(reach * np.sin(tilt)),
        hip_y_mm=float(reach * np.cos(tilt)),
        belly_mm=min(70.0, float(body.gamma(2.2, 18.0))),
        fat_mm=float(16 + body.gamma(2.0, 9.0)),
        bone_density=float(body.uniform(0.7, 1.1)),
    )


def _level_sizes(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Return (levels, 4): depth, height, disc below, wedge; some discs and bodies degenerate."""
    sizes = np.array([row[1:] for row in _LEVELS])
    n = len(sizes)
    sizes[:, 0] *= rng.normal(1, 0.035) * rng.normal(1, 0.015, n)
    sizes[:, 1] *= rng.normal(1, 0.03) * rng.normal(1, 0.02, n)
    sizes[:, 2] *= rng.normal(1, 0.08) * rng.normal(1, 0.08, n)
    sizes[:, 3] += rng.normal(0, 0.025, n)
    narrowed = rng.random(n) < 0.08
    sizes[narrowed, 2] *= rng.uniform(0.35, 0.7, n)[narrowed]
    if rng.random() < 0.12:  # an osteoporotic wedge fracture near the thoracolumbar junction
        level = rng.integers(3, 11)
        sizes[level, 1] *= 0.82
        sizes[level, 3] -= 0.22
    sizes[:, :3] *= scale
    return sizes


def _inclinations(rng: np.random.Generator, slope: float, n_levels: int) -> np.ndarray:
    """Return the inclination of every level for a lordosis that suits the sacral slope."""
    slope_deg = np.degrees(slope)
    lordosis = slope_deg * rng.normal(0.62, 0.08) + rng.normal(32, 5)
    back = slope_deg - lordosis  # of T12, negative: it leans backwards
    kyphosis = np.clip(rng.normal(43, 7), 26, 62)
    t1 = back + kyphosis
    cervical = np.clip(0.75 * t1 + rng.normal(2, 7), -5, 50)
    knots = {
        -1.0: slope_deg,
        0.0: slope_deg - 0.36 * lordosis,
        1.0: slope_deg - 0.60 * lordosis,
        3.0: slope_deg - 0.88 * lordosis,
        5.0: back,
        8.0: back + 0.17 * kyphosis,
        11.0: back + 0.50 * kyphosis,
        14.0: back + 0.84 * kyphosis,
        16.0: t1,
        17.0: t1 - 0.08 * cervical,
        19.5: t1 - 0.55 * cervical,
        22.0: t1 - cervical,
    }
    curve = PchipInterpolator(list(knots), list(knots.values()))
    wobble = rng.normal(0, 1.0, n_levels)
    return np.asarray(np.radians(curve(np.arange(n_levels)) + wobble))


def _ramp() -> np.ndarray:
    """How much of the body's lean each level takes: all of it from L2 up."""
    return np.clip((np.arange(len(_LEVELS)) + 1) / 4, 0, 1)


def _solve_lean(sizes: np.ndarray, inclinations: np.ndarray, slope: float, c7_x_mm: float) -> float:
    """Return the lean of the trunk that brings the centre of C7 to `c7_x_mm`, by secant steps."""

    def miss_mm(lean: float) -> float:
        return _stack(sizes, inclinations + lean * _ramp(), slope)[_C7].x_mm - c7_x_mm

    before, lean = 0.0, 0.05
    miss_before = miss_mm(before)
    for _ in range(6):
        miss = miss_mm(lean)
        if abs(miss) < 1e-3 or miss == miss_before:
            break
        before, lean, miss_before = lean, lean - miss * (lean - before) / (miss - miss_before), miss
    return float(lean)


def _stack(sizes: np.ndarray, inclinations: np.ndarray, slope: float) -> tuple[Vertebra, ...]:
    """Pile the bodies on the S1 endplate, each disc leaning half-way between its neighbours."""
    top, below, pile = (0.0, 0.0), slope, []
    rows = zip(_LEVELS, sizes.tolist(), inclinations.tolist(), strict=True)
    for (level, *_), (depth, height, disc, wedge), inclination in rows:
        top = offset(top, (below + inclination) / 2, 0.0, disc)
        x_mm, y_mm = offset(top, inclination, 0.0, height / 2)
        pile.append(Vertebra(level, x_mm, y_mm, inclination, depth, height, wedge))
        top, below = offset(top, inclination, 0.0, height), inclination
    return tuple(pile)
