"""A synthetic set of standing lateral spine radiographs, with exact keypoints, as DICOM files."""

import csv
import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umtrain.data.synthetic.processes import in_processes
from umtrain.data.synthetic.radiograph_canvas import Point
from umtrain.data.synthetic.radiograph_dicom import FilmHeader, write_film
from umtrain.data.synthetic.radiograph_film import Scene, pose, render
from umtrain.data.synthetic.radiograph_implants import IMPLANTS
from umtrain.files import write_text

DEFAULT_SIZE_PX = 4000
_SMALLEST_SIZE_PX = 64

# Of all images, the share that is MONOCHROME1, faces left, carries metal, and so on.
_MONOCHROME1_SHARE = 0.25
_LEFT_SHARE = 0.5
_IMPLANT_SHARE = 0.12
_IMAGER_SPACING_SHARE = 0.2
_NO_SPACING_SHARE = 0.1
_FOLLOW_UP_SHARE = 0.15

_COLUMNS = (
    *("image_id", "patient_id", "path", "c7_x", "c7_y", "s1_x", "s1_y"),
    *("split", "mm_per_px", "facing", "sha256"),
)


@dataclass(frozen=True)
class RadiographSpec:
    """One radiograph to write: who, how standing, how taken. Holds no pixels.

    spacing: where the millimetres per pixel are stated: in the file as "pixel" or "imager"
    spacing, or ("none") in the manifest alone.
    """

    image_id: str
    patient_id: str
    split: str
    facing: str
    photometric: str
    implant: str | None
    spacing: str
    bits_stored: int
    patient_seed: int
    pose_seed: int

    def scene(self, size_px: int) -> Scene:
        """Return the patient in front of a detector of about `size_px` rows."""
        direction = 1 if self.facing == "right" else -1
        return pose(self.patient_seed, self.pose_seed, direction, size_px)


@dataclass(frozen=True)
class Keypoints:
    """(x, y) in pixels of the stored image, whose first pixel has its centre at (0, 0).

    c7: centre of the C7 vertebral body. s1: posterior superior corner of the sacrum.
    """

    c7: Point
    s1: Point
    mm_per_px: float


def plan_radiographs(n: int, seed: int) -> list[RadiographSpec]:
    """Return what the `n` radiographs of `seed` will be.

    Some patients have a second image; the split is 80/10/10 by patient, no part empty from three
    images on. Fewer than three: the first is for training, the second for testing.
    """
    rng = np.random.default_rng([seed, n])
    patients = _patients_of_images(n)
    splits = _splits(max(patients, default=-1) + 1, rng)
    left = _share(n, _LEFT_SHARE, rng)
    inverted = _share(n, _MONOCHROME1_SHARE, rng)
    metal = _share(n, _IMPLANT_SHARE, rng)
    spacings = rng.permutation(_spacings(n))
    specs = []
    for i, patient in enumerate(patients):
        specs.append(
            RadiographSpec(
                image_id=f"film{i:05d}",
                patient_id=f"patient{patient:05d}",
                split=splits[patient],
                facing="left" if left[i] else "right",
                photometric="MONOCHROME1" if inverted[i] else "MONOCHROME2",
                implant=str(rng.choice(list(IMPLANTS), p=[0.6, 0.25, 0.15])) if metal[i] else None,
                spacing=str(spacings[i]),
                bits_stored=int(rng.choice([12, 14])),
                patient_seed=_subseed(seed, 0, patient),
                pose_seed=_subseed(seed, 1, i),
            )
        )
    return specs


def write_radiograph(spec: RadiographSpec, path: Path, size_px: int = DEFAULT_SIZE_PX) -> Keypoints:
    """Write `spec` as a DICOM file with at least `size_px` rows; whole or not at all.

    The same `spec` and `size_px` give the same bytes.
    """
    scene = spec.scene(size_px)
    film = render(scene, spec.pose_seed, spec.implant)
    header = FilmHeader(
        identity=f"{spec} {size_px}",
        patient_id=spec.patient_id,
        photometric=spec.photometric,
        facing=spec.facing,
        bits_stored=spec.bits_stored,
        spacing=spec.spacing,
        mm_per_px=scene.mm_per_px,
    )
    write_film(path, film, header)
    c7, s1 = scene.keypoints_px()
    return Keypoints(c7, s1, scene.mm_per_px)


def make_radiographs(
    folder: Path,
    n: int,
    size_px: int = DEFAULT_SIZE_PX,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
) -> Path:
    """Write `n` radiographs to `folder`/images and then `folder`/manifest.csv; return the latter.

    progress is called with (done, n) after each image. The manifest comes last, so where it is,
    its images are whole. Raises ValueError if `n` or `size_px` is too small to draw.
    """
    if n < 1 or size_px < _SMALLEST_SIZE_PX:
        raise ValueError(
            f"n={n}, size_px={size_px}: expected n of at least 1 and size_px of at least "
            f"{_SMALLEST_SIZE_PX}"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    jobs = [(spec, folder, size_px) for spec in plan_radiographs(n, seed)]
    rows = []
    for row in in_processes(_write_job, jobs, processes):
        rows.append(row)
        if progress is not None:
            progress(len(rows), n)
    return _write_manifest(folder / "manifest.csv", rows)


_Job = tuple[RadiographSpec, Path, int]


def _write_job(job: _Job) -> dict[str, str]:
    spec, folder, size_px = job
    relative = Path("images") / f"{spec.image_id}.dcm"
    keypoints = write_radiograph(spec, folder / relative, size_px)
    with (folder / relative).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "image_id": spec.image_id,
        "patient_id": spec.patient_id,
        "path": relative.as_posix(),
        "c7_x": f"{keypoints.c7[0]:.3f}",
        "c7_y": f"{keypoints.c7[1]:.3f}",
        "s1_x": f"{keypoints.s1[0]:.3f}",
        "s1_y": f"{keypoints.s1[1]:.3f}",
        "split": spec.split,
        "mm_per_px": f"{keypoints.mm_per_px:.6f}" if spec.spacing == "none" else "",
        "facing": spec.facing,
        "sha256": digest,
    }


def _write_manifest(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path


def _patients_of_images(n: int) -> list[int]:
    """Return the patient of each image; from the fourth on some are a follow-up of the last."""
    patients: list[int] = []
    follow_ups_due = 0.0
    for i in range(n):
        follow_ups_due += _FOLLOW_UP_SHARE
        if i >= 3 and follow_ups_due >= 1:
            patients.append(patients[-1])
            follow_ups_due -= 1
        else:
            patients.append(patients[-1] + 1 if patients else 0)
    return patients


def _splits(n_patients: int, rng: np.random.Generator) -> list[str]:
    if n_patients < 3:
        return ["train", "test"][:n_patients]
    n_held_out = max(1, round(0.1 * n_patients))
    names = ["val"] * n_held_out + ["test"] * n_held_out
    names += ["train"] * (n_patients - len(names))
    return [str(name) for name in rng.permutation(names)]


def _share(n: int, share: float, rng: np.random.Generator) -> list[bool]:
    """Return `n` flags of which exactly the rounded share is set, in random places."""
    return [bool(flag) for flag in rng.permutation(np.arange(n) < round(share * n))]


def _spacings(n: int) -> list[str]:
    n_imager, n_none = round(_IMAGER_SPACING_SHARE * n), round(_NO_SPACING_SHARE * n)
    return (["imager"] * n_imager + ["none"] * n_none + ["pixel"] * n)[:n]


def _subseed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
