"""CT volumes from DICOM series and NIfTI files: Hounsfield units in one orientation."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray

from umtrain.data.ct_nifti import is_nifti, read_nifti
from umtrain.data.ct_series import read_series
from umtrain.data.hounsfield import Scan
from umtrain.errors import DataError

# Slices towards the head, rows towards the back, columns to the patient's left: as radiologists
# look at them.
_AXES = ("S", "P", "L")
_LARGEST_TILT_DEG = 1.0


@dataclass(frozen=True)
class CtVolume:
    """A CT volume: Hounsfield units, int16 (slices, rows, columns), -1024 where nothing is known.

    Slices run from the feet to the head, rows from front to back, columns from the patient's right
    to the left. `spacing_mm` is (slice, row, column).
    """

    hu: NDArray[np.int16]
    spacing_mm: tuple[float, float, float]


def read_ct(path: Path) -> CtVolume:
    """Read a folder that holds one DICOM series, or a NIfTI file (.nii, .nii.gz).

    Raises DataError, naming the file, for what `read_series` and `read_nifti` refuse, and for
    volumes whose axes are not at right angles.
    """
    if path.is_dir():
        scan = read_series(path)
    elif is_nifti(path):
        scan = read_nifti(path)
    else:
        what = "is no CT volume" if path.exists() else "no such file or folder"
        raise DataError(
            f"{path}: {what}; expected a folder with the .dcm files of one series, or a .nii or "
            ".nii.gz file: correct the manifest's path or root"
        )
    return _oriented(scan, path)


def _oriented(scan: Scan, path: Path) -> CtVolume:
    _check_angles(scan.affine_ras, path)
    turn = ornt_transform(io_orientation(scan.affine_ras), axcodes2ornt(_AXES))
    turned = apply_orientation(scan.hu, turn)
    affine = scan.affine_ras @ inv_ornt_aff(turn, scan.hu.shape)
    slice_mm, row_mm, column_mm = (float(size) for size in voxel_sizes(affine))
    return CtVolume(np.ascontiguousarray(turned), (slice_mm, row_mm, column_mm))


def _check_angles(affine: NDArray[np.float64], path: Path) -> None:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(directions.T @ directions - np.eye(3))
    tilt_deg = math.degrees(math.asin(min(1.0, float(cosines.max()))))
    if tilt_deg > _LARGEST_TILT_DEG:
        raise DataError(
            f"{path}: its axes are {tilt_deg:.1f}° off a right angle (a tilted gantry), expected "
            f"at most {_LARGEST_TILT_DEG:g}°; resample it to straight axes first"
        )
