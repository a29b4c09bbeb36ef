"""What reading any DICOM image takes: a header of listed attributes, and its grey pixels.

Only the attributes that a caller lists are ever read, so nothing that identifies a patient can
reach a message, a log or a report.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID

from umtrain.data import radiograph_jpeg
from umtrain.errors import DataError

# What the decoders need, and which pixels are none.
PIXEL_ATTRIBUTES = (
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "SpecificCharacterSet"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
)


@contextmanager
def noting_warnings(notes: list[str]) -> Iterator[None]:
    """Collect pydicom's warnings in `notes` instead of showing them as Python warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes.extend(dict.fromkeys(str(warning.message) for warning in caught))


def read_header(
    path: Path, attributes: Sequence[str], *, stop_before_pixels: bool = False
) -> Dataset:
    """Return the listed attributes of a DICOM file. Raises DataError, naming the file."""
    try:
        return dcmread(path, specific_tags=list(attributes), stop_before_pixels=stop_before_pixels)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the manifest's path or root") from None
    except InvalidDicomError:
        raise DataError(
            f"{path}: not a DICOM file (no 'DICM' after 128 bytes); expected DICOM Part 10"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check its rights") from error
    except Exception as error:  # a damaged header fails in whichever parser meets it first
        raise damaged(path, "its header cannot be parsed", error) from error


def damaged(path: Path, reason: str, error: Exception | None = None) -> DataError:
    """Return the error for a file that has been cut or altered; `error` is what a parser said."""
    kind = f" ({type(error).__name__})" if error else ""
    return DataError(f"{path}: damaged or truncated: {reason}{kind}; fetch the file again")


def check_grey_frame(header: Dataset, path: Path) -> None:
    """Refuse what is not one frame of grey pixels."""
    if "TransferSyntaxUID" not in header.file_meta:
        raise damaged(path, "its file meta information has no TransferSyntaxUID")
    if "PixelData" not in header:
        raise DataError(
            f"{path}: has no PixelData: it is a truncated file or no image (a report, a "
            "presentation state, float pixels); remove its row or fetch the file again"
        )
    required = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
    missing = [keyword for keyword in required if header.get(keyword) is None]
    if missing:
        raise damaged(path, f"its header has no {', '.join(missing)}")
    n_frames = int(header.get("NumberOfFrames") or 1)
    if n_frames != 1:
        raise DataError(
            f"{path}: has {n_frames} frames, expected 1; export the frame you want as its own file"
        )
    photometric = header.get("PhotometricInterpretation")
    n_samples = header.get("SamplesPerPixel", 1)
    if n_samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(
            f"{path}: is a colour image ({photometric}, {n_samples} samples per pixel); expected "
            "MONOCHROME1 or MONOCHROME2: use the original, not a screenshot or secondary capture"
        )
    if header.BitsAllocated not in (8, 16):
        raise DataError(
            f"{path}: has {header.BitsAllocated} bits per pixel, expected 8 or 16; "
            "export it as 16 bit"
        )


def decode_pixels(header: Dataset, path: Path) -> np.ndarray:
    """Return the stored values, (rows, columns), in the file's 8- or 16-bit type."""
    _check_codec(UID(header.file_meta.TransferSyntaxUID), path)
    try:
        stored: np.ndarray = pixel_array(header)
    except Exception as error:  # every codec behind pydicom raises errors of its own
        raise damaged(path, "its pixels cannot be decoded", error) from error
    if stored.shape != (header.Rows, header.Columns) or stored.dtype.itemsize > 2:
        raise damaged(path, f"its pixels decode to {stored.dtype} {stored.shape}")
    return stored


def is_padding(values: np.ndarray, header: Dataset) -> np.ndarray:
    """Return which stored values mark pixels outside the image (DICOM PS3.3 C.7.5.1.1.2)."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return np.zeros(values.shape, bool)
    last = header.get("PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    return np.asarray((values >= low) & (values <= high))


def _check_codec(syntax: UID, path: Path) -> None:
    radiograph_jpeg.register()
    convert = "or convert it to Explicit VR Little Endian"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # how pydicom refuses a syntax that is of no still images
        raise DataError(
            f"{path}: its transfer syntax {syntax.name} ({syntax}) is not one of still images "
            f"that pydicom reads; {convert.removeprefix('or ')}"
        ) from None
    if not decoder.is_available:
        options = "; or ".join(decoder.missing_dependencies)
        raise DataError(
            f"{path}: no codec for its transfer syntax {syntax.name} ({syntax}). "
            f"Install one of: {options}; {convert}"
        )
