"""Synthetic films as DICOM files (Digital X-Ray Image, PS3.3 A.26), the same bytes every time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from umtrain.files import write_atomic

_DIGITAL_XRAY_FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.1"


@dataclass(frozen=True)
class FilmHeader:
    """What a film's file says beside its pixels.

    identity: tells this film from every other one ever made; its DICOM identifiers derive from it.
    spacing: "pixel" (PixelSpacing), "imager" (ImagerPixelSpacing and its magnification) or "none".
    """

    identity: str
    patient_id: str
    photometric: str
    facing: str
    bits_stored: int
    spacing: str
    mm_per_px: float


def write_film(path: Path, film: np.ndarray, header: FilmHeader) -> None:
    """Write `film` (rows, columns), bone bright, 0..1, as 16-bit DICOM with a VOI window.

    The file appears under its name only once it is whole.
    """
    file = FileDataset(str(path), _patient_and_image(header), preamble=b"\0" * 128)
    file.file_meta = _file_meta(header)
    _set_pixels(file, film, header)
    _set_spacing(file, header)
    write_atomic(path, lambda stream: file.save_as(stream, enforce_file_format=True))


def _uid(header: FilmHeader, part: str) -> str:
    return str(generate_uid(entropy_srcs=["umtrain synthetic", header.identity, part]))


def _file_meta(header: FilmHeader) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _DIGITAL_XRAY_FOR_PRESENTATION
    meta.MediaStorageSOPInstanceUID = _uid(header, "image")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationVersionName = "UMTRAIN"
    return meta


def _patient_and_image(header: FilmHeader) -> Dataset:
    image = Dataset()
    image.SOPClassUID = _DIGITAL_XRAY_FOR_PRESENTATION
    image.SOPInstanceUID = _uid(header, "image")
    image.StudyInstanceUID = _uid(header, "study")
    image.SeriesInstanceUID = _uid(header, "series")
    image.PatientName = f"SYNTHETIC^{header.patient_id}"
    image.PatientID = header.patient_id
    image.PatientBirthDate = image.PatientSex = image.StudyDate = image.StudyTime = ""
    image.AccessionNumber = image.ReferringPhysicianName = image.StudyID = ""
    image.SeriesNumber = image.InstanceNumber = 1
    image.Modality, image.BodyPartExamined = "DX", "SPINE"
    image.PresentationIntentType = "FOR PRESENTATION"
    image.ViewPosition = "RL" if header.facing == "left" else "LL"
    image.PatientOrientation = ["A" if header.facing == "right" else "P", "F"]
    image.BurnedInAnnotation = "NO"
    return image


def _set_pixels(file: Dataset, film: np.ndarray, header: FilmHeader) -> None:
    """Store `film` with room below black and above white, as detectors do, and its window."""
    highest = 2**header.bits_stored - 1
    black, white = 0.08 * highest, 0.90 * highest
    pixels = np.empty(film.shape, "<u2")
    for row, stored in zip(film, pixels, strict=True):  # by rows: no second float image
        stored[:] = np.clip(row * np.float32(white - black) + np.float32(black + 0.5), 0, highest)
    centre = (black + white) / 2
    if header.photometric == "MONOCHROME1":
        np.subtract(highest, pixels, out=pixels)
        centre = highest - centre
    file.PresentationLUTShape = "INVERSE" if header.photometric == "MONOCHROME1" else "IDENTITY"
    file.RescaleIntercept, file.RescaleSlope, file.RescaleType = 0, 1, "US"
    file.WindowCenter, file.WindowWidth = round(centre), round(white - black)
    file.set_pixel_data(pixels, header.photometric, header.bits_stored, generate_instance_uid=False)


def _set_spacing(file: Dataset, header: FilmHeader) -> None:
    if header.spacing == "pixel":
        file.PixelSpacing = [header.mm_per_px] * 2
    elif header.spacing == "imager":
        magnification = 1.15
        file.ImagerPixelSpacing = [round(header.mm_per_px * magnification, 8)] * 2
        file.EstimatedRadiographicMagnificationFactor = magnification
