"""One synthetic radiograph, from a patient's anatomy to a film with exact keypoints."""

from dataclasses import dataclass

import numpy as np

from umtrain.data.synthetic.radiograph_anatomy import Anatomy, grow_anatomy
from umtrain.data.synthetic.radiograph_canvas import Canvas, Point
from umtrain.data.synthetic.radiograph_exposure import choose_technique, expose
from umtrain.data.synthetic.radiograph_implants import IMPLANTS
from umtrain.data.synthetic.radiograph_skeleton import paint_skeleton
from umtrain.data.synthetic.radiograph_soft import paint_soft_tissue, raise_arms
from umtrain.data.synthetic.radiograph_spine import paint_spine

# Soft tissue and the bones around the spine need no finer pixels than these.
_COARSE_MM = 0.55


@dataclass(frozen=True)
class Scene:
    """A patient in front of the detector.

    shape: (rows, columns) of the film. origin_px: (x, y) of the body frame's origin.
    direction: +1 if the patient faces right.
    """

    anatomy: Anatomy
    shape: tuple[int, int]
    mm_per_px: float
    origin_px: Point
    direction: int

    def canvas(self) -> Canvas:
        """Return an empty canvas of the film."""
        return Canvas(self.shape, self.mm_per_px, self.origin_px, self.direction)

    def keypoints_px(self) -> tuple[Point, Point]:
        """Return (x, y) of C7's centre and of the sacrum's posterior superior corner.

        The centre of the film's first pixel is (0, 0).
        """
        canvas = self.canvas()
        corner, centre = self.anatomy.s1_corner_mm, self.anatomy.c7_centre_mm
        return canvas.to_px(centre), canvas.to_px(corner)


def pose(patient_seed: int, pose_seed: int, direction: int, n_rows: int) -> Scene:
    """Return patient `patient_seed` in front of a detector of at least `n_rows` rows.

    The field spans the patient from the base of the skull to the thighs, so the spacing follows
    from `n_rows`; where on it the patient stands differs from pose to pose.
    """
    rng = np.random.default_rng([pose_seed, 3])
    anatomy = grow_anatomy(patient_seed, pose_seed)
    top_mm = anatomy.vertebra("C2").y_mm - 48 * anatomy.scale
    bottom_mm = anatomy.hip_y_mm + 38 * anatomy.scale
    field_mm = bottom_mm - top_mm + rng.uniform(15, 100)
    rows = round(n_rows * rng.uniform(1.0, 1.04))
    columns = round(rows * rng.uniform(0.47, 0.54))
    mm_per_px = round(field_mm / rows, 6)  # a DICOM decimal string holds no more
    slack_mm = field_mm - (bottom_mm - top_mm)
    y_px = (slack_mm * rng.uniform(0.1, 0.9) - top_mm) / mm_per_px
    x_mm = _lateral_shift_mm(anatomy, columns * mm_per_px, rng)
    x_px = (columns - 1) / 2 + direction * x_mm / mm_per_px
    return Scene(anatomy, (rows, columns), mm_per_px, (x_px, float(y_px)), direction)


def _lateral_shift_mm(anatomy: Anatomy, width_mm: float, rng: np.random.Generator) -> float:
    """Return how far in front of the film's middle the body frame's origin stands."""
    keypoints_x_mm = (anatomy.c7_centre_mm[0], anatomy.s1_corner_mm[0])
    margin_mm = 0.5 * width_mm - 35
    lowest, highest = -margin_mm - min(keypoints_x_mm), margin_mm - max(keypoints_x_mm)
    return float(np.clip(rng.normal(-28, 22), lowest, highest))


def render(scene: Scene, pose_seed: int, implant: str | None) -> np.ndarray:
    """Return the film of `scene`: (rows, columns) float32, about 0..1, bone bright."""
    rng = np.random.default_rng([pose_seed, 4])
    spine = scene.canvas()
    factor = max(1, round(_COARSE_MM / scene.mm_per_px))
    soft, skeleton = spine.coarser(factor), spine.coarser(factor)
    arms = raise_arms(scene.anatomy, rng)
    paint_soft_tissue(soft, scene.anatomy, arms, rng)
    paint_skeleton(skeleton, scene.anatomy, arms, rng)
    paint_spine(spine, scene.anatomy, rng)
    if implant is not None:
        IMPLANTS[implant](spine, scene.anatomy, rng)
    return expose(spine, soft, skeleton, choose_technique(rng), rng)
