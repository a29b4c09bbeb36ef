"""CT volumes in NIfTI files."""

from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from umtrain.data.hounsfield import Scan, to_hu
from umtrain.errors import DataError

_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}
_N_DIMS = 3


def is_nifti(path: Path) -> bool:
    """Return whether `path` is a file that is called .nii or .nii.gz."""
    return path.is_file() and path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti(path: Path) -> Scan:
    """Read one volume; its values, by the header's slope and intercept, are Hounsfield units.

    Raises DataError, naming the file, if it is damaged, does not hold one volume of grey values,
    or does not say how it lies in the patient (neither sform nor qform).
    """
    try:
        image = nibabel.load(path)
        affine = _affine(image, path)
        shape = image.shape[:_N_DIMS]
        if len(shape) < _N_DIMS or int(np.prod(image.shape)) != int(np.prod(shape)):
            raise DataError(
                f"{path}: has shape {image.shape}, expected one volume (x, y, z); export the "
                "volume that you want as its own file"
            )
        if min(shape) < 2 or image.get_data_dtype().kind not in "iuf":
            raise DataError(
                f"{path}: holds {image.get_data_dtype()} {shape}, expected numbers in at least 2 "
                "voxels along each axis; export the CT as 16-bit integers"
            )
        values = np.asarray(image.dataobj, np.float32).reshape(shape)
    except DataError:
        raise
    except Exception as error:  # gzip, zlib and nibabel each raise errors of their own
        raise DataError(
            f"{path}: cannot be read as NIfTI ({type(error).__name__}): damaged or truncated; "
            "fetch the file again"
        ) from error
    return Scan(to_hu(values), affine)


def _affine(image: nibabel.Nifti1Image, path: Path) -> NDArray[np.float64]:
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        raise DataError(
            f"{path}: does not say how it lies in the patient (sform and qform are 0); export it "
            "again with its orientation"
        )
    affine = np.asarray(image.affine, np.float64).copy()
    affine[:3] *= _MM_PER_UNIT[image.header.get_xyzt_units()[0]]
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(
            f"{path}: its voxels have no size (sform or qform is singular); export it again"
        )
    return affine
