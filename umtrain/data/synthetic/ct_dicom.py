"""Synthetic volumes as DICOM series (CT Image, PS3.3 A.3), the same bytes every time."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from umtrain.files import write_atomic

_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
_INTERCEPT_HU = -1024
_BITS_STORED = 12


@dataclass(frozen=True)
class SeriesHeader:
    """What a series says beside its pixels.

    identity: tells this series from every other one ever made; its DICOM identifiers derive from
    it. first_mm: where the middle of the first voxel lies, to the left, back and head.
    """

    identity: str
    patient_id: str
    spacing_mm: tuple[float, float, float]
    first_mm: tuple[float, float, float]


def write_series(folder: Path, hu: NDArray[np.floating], header: SeriesHeader) -> None:
    """Write `hu` (slices, rows, columns), feet first, as one file a slice into a new folder.

    Files are numbered as a scanner does, from the head down.
    """
    folder.mkdir()
    n_slices = len(hu)
    for number in range(1, n_slices + 1):
        at = n_slices - number
        path = folder / f"ct_{number:04d}.dcm"
        file = FileDataset(str(path), _common(header), preamble=b"\0" * 128)
        file.file_meta = _file_meta(header, number)
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID
        _set_geometry(file, header, number, at)
        _set_pixels(file, hu[at])
        write_atomic(path, partial(file.save_as, enforce_file_format=True))


def _uid(header: SeriesHeader, part: str) -> str:
    return str(generate_uid(entropy_srcs=["umtrain synthetic", header.identity, part]))


def _file_meta(header: SeriesHeader, number: int) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _CT_IMAGE
    meta.MediaStorageSOPInstanceUID = _uid(header, f"image {number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationVersionName = "UMTRAIN"
    return meta


def _common(header: SeriesHeader) -> Dataset:
    image = Dataset()
    image.SOPClassUID = _CT_IMAGE
    image.StudyInstanceUID = _uid(header, "study")
    image.SeriesInstanceUID = _uid(header, "series")
    image.FrameOfReferenceUID = _uid(header, "frame")
    image.PatientName = f"SYNTHETIC^{header.patient_id}"
    image.PatientID = header.patient_id
    image.PatientBirthDate = image.PatientSex = image.StudyDate = image.StudyTime = ""
    image.AccessionNumber = image.ReferringPhysicianName = image.StudyID = ""
    image.Modality, image.BodyPartExamined, image.PatientPosition = "CT", "CHEST", "HFS"
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.Manufacturer = "umtrain"
    image.KVP, image.ConvolutionKernel, image.GantryDetectorTilt = 120, "B30", 0
    image.SeriesNumber = image.AcquisitionNumber = 1
    image.BurnedInAnnotation = "NO"
    return image


def _set_geometry(file: Dataset, header: SeriesHeader, number: int, at: int) -> None:
    slice_mm, row_mm, column_mm = header.spacing_mm
    left, back, head = header.first_mm
    file.InstanceNumber = number
    file.SliceThickness = file.SpacingBetweenSlices = f"{slice_mm:g}"
    file.PixelSpacing = [f"{row_mm:.6f}", f"{column_mm:.6f}"]
    file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    place = (left, back, head + at * slice_mm)
    file.ImagePositionPatient = [f"{value:.4f}" for value in place]
    file.SliceLocation = f"{place[2]:.4f}"


def _set_pixels(file: Dataset, hu: NDArray[np.floating]) -> None:
    stored = np.clip(np.rint(hu - _INTERCEPT_HU), 0, 2**_BITS_STORED - 1).astype("<u2")
    file.RescaleIntercept, file.RescaleSlope, file.RescaleType = _INTERCEPT_HU, 1, "HU"
    file.WindowCenter, file.WindowWidth = -600, 1500
    file.set_pixel_data(stored, "MONOCHROME2", _BITS_STORED, generate_instance_uid=False)
