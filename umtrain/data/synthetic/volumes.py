"""A synthetic set of chest CTs as real files: DICOM series and NIfTI in turn, and a manifest."""

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np

from umtrain.data.digest import content_sha256
from umtrain.data.synthetic.ct_dicom import SeriesHeader, write_series
from umtrain.data.synthetic.processes import in_processes
from umtrain.data.synthetic.slides import plan_slides
from umtrain.data.synthetic.thorax import HEIGHT_MM, WIDTH_MM, Thorax, make_thorax
from umtrain.files import write_atomic, write_text

SMALLEST_SIZE_PX = 32
COLUMNS = ("volume_id", "patient_id", "path", "label", "split", "sha256")
LABELS = {"0": "normal", "1": "mass"}

_SLICE_SPACINGS_MM = (3.0, 4.0, 5.0)


@dataclass(frozen=True)
class VolumeSpec:
    """One volume to write. `is_dicom`: as a DICOM series, else as NIfTI."""

    volume_id: str
    patient_id: str
    label: str
    split: str
    seed: int
    is_dicom: bool

    def thorax(self, size_px: int) -> Thorax:
        """Return the patient, scanned with `size_px` rows and columns."""
        rng = np.random.default_rng([self.seed, 1])
        slice_mm = float(rng.choice(_SLICE_SPACINGS_MM))
        pixel_mm = round(WIDTH_MM * float(rng.uniform(0.98, 1.1)) / size_px, 6)
        shape = (round(HEIGHT_MM / slice_mm), size_px, size_px)
        spacing_mm = (slice_mm, pixel_mm, pixel_mm)
        return make_thorax(shape, spacing_mm, self.seed, positive=self.label == LABELS["1"])

    @property
    def path(self) -> Path:
        """Return the folder of the series, or the file, from the manifest's folder."""
        name = self.volume_id if self.is_dicom else f"{self.volume_id}.nii.gz"
        return Path("volumes") / name


def plan_volumes(n: int, seed: int) -> list[VolumeSpec]:
    """Return `n` volumes to write; splits, labels and patients are as `plan_slides` makes them."""
    # Formats are mixed over labels and splits: which one a file has says nothing about it.
    is_dicom = np.random.default_rng([seed, 2]).permutation(np.arange(n) % 2 == 0)
    return [
        VolumeSpec(
            volume_id=f"volume_{at:04d}",
            patient_id=plan.patient_id,
            label=LABELS[plan.label],
            split=plan.split,
            seed=plan.seed,
            is_dicom=bool(is_dicom[at]),
        )
        for at, plan in enumerate(plan_slides(n, seed))
    ]


def write_volume(spec: VolumeSpec, folder: Path, size_px: int) -> Path:
    """Write `spec` below `folder` and return its path; same arguments, same bytes."""
    thorax = spec.thorax(size_px)
    path = folder / spec.path
    # The middle of the chest lies where a table put it.
    table_mm = np.random.default_rng([spec.seed, 3]).uniform(-150, 150, 3).round(1)
    half_mm = [(n - 1) / 2 * mm for n, mm in zip(thorax.hu.shape, thorax.spacing_mm, strict=True)]
    left, back, head = (float(t - h) for t, h in zip(table_mm, half_mm[::-1], strict=True))
    if spec.is_dicom:
        identity = f"{spec} {size_px}"
        header = SeriesHeader(identity, spec.patient_id, thorax.spacing_mm, (left, back, head))
        write_series(path, thorax.hu, header)
    else:
        write_atomic(path, lambda stream: stream.write(_nifti(thorax, (left, back, head))))
    return path


def _nifti(thorax: Thorax, first_mm: tuple[float, float, float]) -> bytes:
    """Return a compressed file whose axes run to the left, back and head, as converters write."""
    slice_mm, row_mm, column_mm = thorax.spacing_mm
    left, back, head = first_mm
    affine = np.diag([-column_mm, -row_mm, slice_mm, 1.0])
    affine[:3, 3] = -left, -back, head
    hu = np.rint(np.clip(thorax.hu, -1024, 3071)).astype(np.int16)
    image = nibabel.Nifti1Image(hu.T, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def make_volumes(
    folder: Path,
    n: int,
    size_px: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
) -> Path:
    """Write `n` volumes to `folder`/volumes and then `folder`/manifest.csv; return the latter.

    Half are DICOM series, half NIfTI. `progress` is called with (done, n) after each volume.
    Raises ValueError if `n` or `size_px` is too small to draw.
    """
    if n < 1 or size_px < SMALLEST_SIZE_PX:
        raise ValueError(
            f"n={n}, size_px={size_px}: expected n of at least 1 and size_px of at least "
            f"{SMALLEST_SIZE_PX}"
        )
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    specs = plan_volumes(n, seed)
    rows = []
    for row in in_processes(partial(_write_row, folder, size_px), specs, processes):
        rows.append(row)
        if progress is not None:
            progress(len(rows), n)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "manifest.csv", text.getvalue())
    return folder / "manifest.csv"


def _write_row(folder: Path, size_px: int, spec: VolumeSpec) -> dict[str, str]:
    path = write_volume(spec, folder, size_px)
    return {
        "volume_id": spec.volume_id,
        "patient_id": spec.patient_id,
        "path": spec.path.as_posix(),
        "label": spec.label,
        "split": spec.split,
        "sha256": content_sha256(path),
    }
