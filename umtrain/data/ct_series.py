"""CT volumes as DICOM series: a folder of slices, put in order by where they lie.

See DICOM PS3.3, C.7.6.2 (image plane) and C.11.1 (modality LUT).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut

from umtrain.data.dicom import (
    PIXEL_ATTRIBUTES,
    check_grey_frame,
    damaged,
    decode_pixels,
    is_padding,
    noting_warnings,
    read_header,
)
from umtrain.data.hounsfield import AIR_HU, Scan, to_hu
from umtrain.errors import DataError

_LOG = logging.getLogger(__name__)

_GEOMETRY = (
    *("Modality", "SeriesInstanceUID", "Rows", "Columns"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
)
_VALUES = (
    *PIXEL_ATTRIBUTES,
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType"),
)
# DICOM counts to the left and back, NIfTI and the rest of the field to the right and front.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNEVEN_SHARE = 0.05  # of the distance between slices
_SAME_PLACE_MM = 1e-3
_SAME = 1e-3
_SKEW = 0.01


@dataclass(frozen=True)
class _Slice:
    """Where a slice lies: millimetres in DICOM's axes, and along the normal of its plane."""

    path: Path
    position: NDArray[np.float64]
    along_mm: float


@dataclass(frozen=True)
class _Plane:
    """What all slices of a series share.

    `rows` and `columns` are the directions in which the index of a row and of a column grows.
    """

    series: str
    shape: tuple[int, int]
    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    spacing_mm: tuple[float, float]

    @property
    def normal(self) -> NDArray[np.float64]:
        """Return the direction in which slices follow each other."""
        return np.cross(self.columns, self.rows)

    def differs(self, other: "_Plane") -> str | None:
        """Return the attribute in which two slices differ; None if in none."""
        if self.series != other.series:
            return "SeriesInstanceUID"
        if self.shape != other.shape:
            return "Rows and Columns"
        if not np.allclose(self.spacing_mm, other.spacing_mm, rtol=_SAME, atol=0):
            return "PixelSpacing"
        turned = np.stack([self.rows - other.rows, self.columns - other.columns])
        return "ImageOrientationPatient" if np.abs(turned).max() > _SAME else None


def slice_files(folder: Path) -> list[Path]:
    """Return the files of a series, sorted by name: those called .dcm, or else all of the folder.

    DICOMDIR and hidden files are no slices.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name.upper() != "DICOMDIR"
    )
    named = [path for path in files if path.suffix.lower() == ".dcm"]
    return named or files


def read_series(folder: Path) -> Scan:
    """Read the slices of one CT series, in the order of their positions along their normal.

    Raises DataError, naming the file, for slices of several series, sizes or planes, for one that
    is missing, double or has no position, for distances that differ by more than 5%, and for
    values that are no Hounsfield units.
    """
    files = slice_files(folder)
    if len(files) < 2:
        raise DataError(
            f"{folder}: holds {len(files)} slices, expected at least 2 .dcm files of one series; "
            "correct the manifest's path"
        )
    notes: list[str] = []
    with noting_warnings(notes):
        plane, slices = _ordered(files)
        _check_distances(slices, folder)
        hu = np.stack([_read_slice(place.path, plane.shape) for place in slices])
    for note in notes:
        _LOG.warning("%s: %s", folder, note)
    return Scan(hu, _affine(plane, slices))


def _ordered(files: Sequence[Path]) -> tuple[_Plane, list[_Slice]]:
    first, slices = None, []
    for path in files:
        header = read_header(path, _GEOMETRY, stop_before_pixels=True)
        plane = _plane(header, path)
        first = first or plane
        attribute = plane.differs(first)
        if attribute is not None:
            raise DataError(
                f"{path}: {attribute} differs from that of {files[0].name}, expected one series "
                "in a folder; move the files of other series (scouts, other reconstructions) away"
            )
        position = _numbers(header, "ImagePositionPatient", 3, path)
        slices.append(_Slice(path, position, float(position @ first.normal)))
    assert first is not None
    return first, sorted(slices, key=lambda place: place.along_mm)


def _plane(header: Dataset, path: Path) -> _Plane:
    modality = header.get("Modality")
    if modality != "CT":
        raise DataError(
            f"{path}: Modality is {modality or 'missing'}, expected CT: only CT has Hounsfield "
            "units; remove the file, or its row from the manifest"
        )
    if header.get("Rows") is None or header.get("Columns") is None:
        raise damaged(path, "its header has no Rows, Columns")
    orientation = _numbers(header, "ImageOrientationPatient", 6, path)
    columns, rows = orientation[:3], orientation[3:]
    axes = np.stack([columns, rows])
    if np.abs(axes @ axes.T - np.eye(2)).max() > _SKEW:
        raise DataError(
            f"{path}: ImageOrientationPatient is {orientation.tolist()}, expected two unit vectors "
            "at a right angle; fetch the file again"
        )
    row_mm, column_mm = _numbers(header, "PixelSpacing", 2, path)
    if not (row_mm > 0 and column_mm > 0):
        raise DataError(
            f"{path}: PixelSpacing is {row_mm:g}, {column_mm:g}, expected millimetres above 0; "
            "fetch the file again"
        )
    shape = (int(header.Rows), int(header.Columns))
    series = str(header.get("SeriesInstanceUID", ""))
    return _Plane(series, shape, rows, columns, (float(row_mm), float(column_mm)))


def _numbers(header: Dataset, keyword: str, n: int, path: Path) -> NDArray[np.float64]:
    try:
        values = np.array([float(value) for value in header.get(keyword) or ()])
    except (TypeError, ValueError):
        values = np.empty(0)
    if len(values) != n or not np.isfinite(values).all():
        raise DataError(
            f"{path}: {keyword} is missing or no list of {n} numbers; expected an axial CT image, "
            "not a scout or a report: remove the file, or fetch it again"
        )
    return values


def _check_distances(slices: Sequence[_Slice], folder: Path) -> None:
    """Refuse slices at one place, and distances unlike the most."""
    distances = [after.along_mm - before.along_mm for before, after in pairwise(slices)]
    for before, after in pairwise(slices):
        if after.along_mm - before.along_mm < _SAME_PLACE_MM:
            raise DataError(
                f"{folder}: {before.path.name} and {after.path.name} lie at the same place "
                f"({before.along_mm:.2f} mm), expected one slice there; remove one of the two"
            )
    usual = float(np.median(distances))
    for (before, after), distance in zip(pairwise(slices), distances, strict=True):
        if abs(distance - usual) > _UNEVEN_SHARE * usual:
            n_missing = round(distance / usual) - 1
            what = f"{n_missing} missing" if n_missing > 0 else "an uneven distance"
            raise DataError(
                f"{folder}: between {before.path.name} and {after.path.name} are {distance:.2f} "
                f"mm, expected {usual:.2f} as between most slices ({what}); fetch the whole series"
            )


def _read_slice(path: Path, shape: tuple[int, int]) -> NDArray[np.int16]:
    header = read_header(path, _VALUES)
    check_grey_frame(header, path)
    stored = decode_pixels(header, path)
    if stored.shape != shape:
        raise damaged(path, f"its pixels are {stored.shape}, its header says {shape}")
    if header.get("RescaleType") not in (None, "", "HU"):
        raise DataError(
            f"{path}: RescaleType is {header.RescaleType}, expected HU: Hounsfield units; use the "
            "original CT series"
        )
    has_rescale = header.get("RescaleSlope") is not None and math.isfinite(
        float(header.get("RescaleIntercept", math.nan))
    )
    if not has_rescale and not header.get("ModalityLUTSequence"):
        raise DataError(
            f"{path}: has neither RescaleSlope and RescaleIntercept nor a modality LUT, so its "
            "values are no Hounsfield units; use the original CT series"
        )
    try:
        values = np.asarray(apply_modality_lut(stored, header), np.float64)
    except Exception as error:  # malformed LUTs fail in many ways inside pydicom
        raise damaged(path, "its modality LUT cannot be applied", error) from error
    return to_hu(np.where(is_padding(stored, header), AIR_HU, values))


def _affine(plane: _Plane, slices: Sequence[_Slice]) -> NDArray[np.float64]:
    """Return the map from (slice, row, column) to millimetres."""
    affine = np.eye(4)
    affine[:3, 0] = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    affine[:3, 1] = plane.rows * plane.spacing_mm[0]
    affine[:3, 2] = plane.columns * plane.spacing_mm[1]
    affine[:3, 3] = slices[0].position
    return np.asarray(_LPS_TO_RAS @ affine)
