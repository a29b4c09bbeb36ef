"""Radiographs from DICOM files: 16-bit pixels with bone bright, and millimetres per pixel.

Only the attributes listed in `_ATTRIBUTES` are ever read, so nothing that identifies a patient
can reach a message, a log or a report from here.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

from umtrain.data.dicom import (
    PIXEL_ATTRIBUTES,
    check_grey_frame,
    decode_pixels,
    is_padding,
    noting_warnings,
    read_header,
)
from umtrain.errors import DataError

_LOG = logging.getLogger(__name__)

_ATTRIBUTES = [
    *PIXEL_ATTRIBUTES,
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("PixelSpacing", "ImagerPixelSpacing", "EstimatedRadiographicMagnificationFactor"),
]

# Without a window or LUT in the file, the grey scale spans these percentiles of the image: wide
# enough to keep bone, tight enough that a few hot pixels or a lead marker do not flatten it.
_UNWINDOWED_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class RadiographImage:
    """A radiograph as a display would show it, bone bright.

    pixels: (rows, columns) uint16, the grey scale of the file stretched to 0..65535.
    spacing_mm: (row, column) spacing on the patient, or None if the file does not state it.
    spacing_source: the attribute that the spacing is from, or why there is none.
    notes: what the file's decoder had to assume; also logged. Usually empty.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None
    spacing_source: str
    notes: tuple[str, ...] = ()


def read_radiograph(path: Path) -> RadiographImage:
    """Read one single-frame, single-channel DICOM image.

    Grey values go through the modality LUT (or rescale), then the first VOI LUT or window of the
    file, then are inverted if MONOCHROME1 (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2). The output range
    of the VOI step is mapped linearly to 0..65535; a file without one is stretched between the
    0.5th and 99.5th percentile of its pixels. Pixel padding becomes 0.

    Raises DataError, naming the file, if it is missing, damaged, not DICOM, in a transfer syntax
    without a codec, blank, in colour or of several frames.
    """
    notes: list[str] = []
    with noting_warnings(notes):
        header = read_header(path, _ATTRIBUTES)
        check_grey_frame(header, path)
        stored = decode_pixels(header, path)
        pixels = _to_display(stored, header, path)
    for note in notes:
        _LOG.warning("%s: %s", path, note)
    spacing_mm, source = _spacing_in_file(header)
    return RadiographImage(pixels, spacing_mm, source, tuple(notes))


def pixel_spacing_mm(
    image: RadiographImage, manifest_mm_per_px: float | None, path: Path
) -> tuple[float, float]:
    """Return the (row, column) spacing on the patient in mm: the file's, else the manifest's.

    Raises DataError, naming `path`, if neither states it.
    """
    if image.spacing_mm is not None:
        return image.spacing_mm
    if manifest_mm_per_px is None:
        raise DataError(
            f"{path}: no pixel spacing: {image.spacing_source}; expected PixelSpacing, or "
            "ImagerPixelSpacing with EstimatedRadiographicMagnificationFactor. "
            "Put the millimetres per pixel in the manifest's column mm_per_px."
        )
    if not (math.isfinite(manifest_mm_per_px) and manifest_mm_per_px > 0):
        raise DataError(
            f"{path}: the manifest's mm_per_px is {manifest_mm_per_px}; expected a number above 0"
        )
    return (manifest_mm_per_px, manifest_mm_per_px)


def column_spacing_mm(
    image: RadiographImage, manifest_mm_per_px: float | None, path: Path
) -> float:
    """Return the horizontal spacing in mm per pixel, which SVA is measured with.

    Raises DataError as `pixel_spacing_mm` does.
    """
    return pixel_spacing_mm(image, manifest_mm_per_px, path)[1]


def _to_display(stored: np.ndarray, header: Dataset, path: Path) -> np.ndarray:
    """Return `stored` as uint16 grey values 0..65535, bone bright.

    All steps act on a pixel by its value alone, so they run once for every value that the type
    can hold, and the image is one table look-up: exact, and no float copy of the image is made.
    """
    codes = stored.view(f"u{stored.dtype.itemsize}")
    n_codes = 2 ** (8 * stored.dtype.itemsize)
    values = np.arange(n_codes, dtype=codes.dtype).view(stored.dtype)
    padding = is_padding(values, header)
    counts = np.bincount(codes.ravel(), minlength=n_codes)
    counts[padding] = 0
    if np.count_nonzero(counts) < 2:
        raise DataError(f"{path}: blank: all its pixels have one value; fetch or expose it again")
    try:
        grey = _grey_scale(values, counts, header)
    except Exception as error:  # malformed LUTs and windows fail in many ways inside pydicom
        raise DataError(
            f"{path}: its modality LUT, VOI LUT or window cannot be applied "
            f"({type(error).__name__}); correct or remove these attributes"
        ) from error
    if header.PhotometricInterpretation == "MONOCHROME1":
        grey = 1.0 - grey
    table = np.rint(grey * 65535).astype(np.uint16)
    table[padding] = 0
    if np.ptp(table[counts > 0]) == 0:
        raise DataError(
            f"{path}: its window or VOI LUT turns every pixel into one grey value; "
            "correct or remove WindowCenter and WindowWidth"
        )
    pixels: np.ndarray = table[codes]
    return pixels


def _grey_scale(values: np.ndarray, counts: np.ndarray, header: Dataset) -> np.ndarray:
    """Return the grey value 0..1 of every stored value, before MONOCHROME1 is inverted."""
    modality = np.asarray(apply_modality_lut(values, header))
    if header.get("VOILUTSequence"):
        return _voi_lut_grey(modality, header)
    if header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        grey = np.asarray(apply_windowing(modality, header))
        with np.errstate(over="ignore"):
            # Far outside the window lie the two ends of the output range. With a negative
            # rescale slope the first is the larger one, and still the dark one.
            dark, bright = apply_windowing(np.array([-1e9, 1e9]), header)
    else:
        grey = modality.astype(float)
        dark, bright = _percentiles(grey, counts)
    return np.asarray(np.clip((grey - dark) / (bright - dark), 0.0, 1.0))


def _voi_lut_grey(modality: np.ndarray, header: Dataset) -> np.ndarray:
    lut = header.VOILUTSequence[0]
    n_entries, first, n_bits = lut.LUTDescriptor
    # pydicom indexes with the type of the LUT's output, too narrow for a long table of 8 bits.
    lut.LUTDescriptor = [n_entries, first, 16]
    grey = np.asarray(apply_voi(np.rint(modality).astype(np.int64), header))
    return np.asarray(np.clip(grey / (2**n_bits - 1), 0.0, 1.0))


def _percentiles(grey: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the low and high percentile of an image given as `counts` of its grey values."""
    order = np.argsort(grey, kind="stable")
    order = order[counts[order] > 0]
    cumulative = np.cumsum(counts[order]) / counts.sum()
    low, high = (grey[order[np.searchsorted(cumulative, p / 100)]] for p in _UNWINDOWED_PERCENTILES)
    if low == high:  # nearly all pixels share one value: the few others are the image
        low, high = grey[order[0]], grey[order[-1]]
    return float(low), float(high)


def _spacing_in_file(header: Dataset) -> tuple[tuple[float, float] | None, str]:
    """Return the (row, column) spacing on the patient and its source, or None and why.

    ImagerPixelSpacing is measured on the detector: the magnification takes it to the patient.
    """
    spacing = _positive_pair(header, "PixelSpacing")
    if spacing is not None:
        return spacing, "PixelSpacing"
    detector = _positive_pair(header, "ImagerPixelSpacing")
    if detector is None:
        return None, "the file has neither a positive PixelSpacing nor ImagerPixelSpacing"
    magnification = _positive(header, "EstimatedRadiographicMagnificationFactor")
    if magnification is None:
        return None, "the file has ImagerPixelSpacing, at the detector, without its magnification"
    source = "ImagerPixelSpacing / EstimatedRadiographicMagnificationFactor"
    return (detector[0] / magnification, detector[1] / magnification), source


def _positive_pair(header: Dataset, keyword: str) -> tuple[float, float] | None:
    try:
        row, column = (float(value) for value in header.get(keyword) or ())
    except (TypeError, ValueError):
        return None
    valid = math.isfinite(row) and math.isfinite(column) and row > 0 and column > 0
    return (row, column) if valid else None


def _positive(header: Dataset, keyword: str) -> float | None:
    try:
        value = float(header.get(keyword, "nan"))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
