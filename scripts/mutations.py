"""Damaged image files, made from whole ones: what `scripts/fuzz_inputs.py` feeds to the readers.

A mutation takes the bytes of a file and a generator, and returns other bytes. Those for TIFF know
the directory's layout (TIFF 6.0, section 2), those for DICOM set elements that lie (PS3.5).
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import tifffile
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

Mutation = Callable[[bytes, np.random.Generator], bytes]


# Any file


def cut_short(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def flip_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(content, rng, 0, len(content))


def flip_header(content: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(content, rng, 0, min(2048, len(content)))


def zero_a_range(content: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(len(content), size=2).tolist())
    return content[:first] + bytes(last - first) + content[last:]


def insert_garbage(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(content)))
    return content[:at] + rng.bytes(int(rng.integers(1, 4096))) + content[at:]


def leave_out_a_range(content: bytes, rng: np.random.Generator) -> bytes:
    first = int(rng.integers(len(content)))
    return content[:first] + content[first + int(rng.integers(1, 4096)) :]


def garbage(content: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(0, 4096)))


def garbage_with_its_magic(content: bytes, rng: np.random.Generator) -> bytes:
    return content[:140] + rng.bytes(len(content) - 140)


def _flipped(content: bytes, rng: np.random.Generator, first: int, last: int) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(first, last, size=int(rng.integers(1, 30))):
        changed[at] = int(rng.integers(256))
    return bytes(changed)


ANY: tuple[Mutation, ...] = (
    *(cut_short, flip_bytes, flip_header, zero_a_range, insert_garbage),
    *(leave_out_a_range, garbage, garbage_with_its_magic),
)


# TIFF and SVS: classic, little-endian

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_DESCRIPTION, _SAMPLES, _PLANAR, _PREDICTOR = 270, 277, 284, 317
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_ABSURD = (0, 1, 2, 3, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


@dataclass(frozen=True)
class _Directory:
    """Where an image file directory lies, its entries by tag, and where it says what is next."""

    start: int
    entries: dict[int, int]
    next_at: int


def _directories(content: bytes) -> list[_Directory]:
    found, start = [], struct.unpack_from("<I", content, 4)[0]
    while start:
        n_entries = struct.unpack_from("<H", content, start)[0]
        places = [start + 2 + 12 * number for number in range(n_entries)]
        entries = {struct.unpack_from("<H", content, place)[0]: place for place in places}
        next_at = start + 2 + 12 * n_entries
        found.append(_Directory(start, entries, next_at))
        start = struct.unpack_from("<I", content, next_at)[0]
    return found


def _with_tag(*tags: int, values: tuple[int, ...] = _ABSURD) -> Mutation:
    """Return what makes a tag, of all directories or one, a single LONG of an absurd value."""

    def mutate(content: bytes, rng: np.random.Generator) -> bytes:
        changed, value = bytearray(content), int(rng.choice(values))
        directories = _directories(content)
        chosen = directories if rng.integers(2) else [directories[rng.integers(len(directories))]]
        for directory in chosen:
            for tag in tags:
                if tag in directory.entries:
                    struct.pack_into("<HHII", changed, directory.entries[tag], tag, 4, 1, value)
        return bytes(changed)

    mutate.__name__ = "tag_" + "_".join(map(str, tags))
    return mutate


def cyclic_directories(content: bytes, rng: np.random.Generator) -> bytes:
    changed, directories = bytearray(content), _directories(content)
    target = directories[rng.integers(len(directories))].start
    struct.pack_into("<I", changed, directories[-1].next_at, target)
    return bytes(changed)


def huge_counts(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    places = list(_directories(content)[0].entries.values())
    for place in rng.choice(places, size=2):
        struct.pack_into("<I", changed, place + 4, int(rng.choice((2**16, 2**28, 2**32 - 1))))
    return bytes(changed)


def unknown_types(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    places = list(_directories(content)[0].entries.values())
    for place in rng.choice(places, size=2):
        struct.pack_into("<H", changed, place + 2, int(rng.integers(0, 2**16)))
    return bytes(changed)


def many_directory_entries(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    struct.pack_into("<H", changed, _directories(content)[0].start, int(rng.integers(2**16)))
    return bytes(changed)


def directory_elsewhere(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    struct.pack_into("<I", changed, 4, int(rng.integers(2**32)))
    return bytes(changed)


def compressed_garbage(content: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite the file behind its first kilobyte, but for the directories, with noise."""
    changed = bytearray(content)
    kept = [(d.start - 512, d.next_at + 1024) for d in _directories(content)]
    noise = rng.bytes(len(content))
    for at in range(1024, len(content)):
        if not any(first <= at < last for first, last in kept):
            changed[at] = noise[at]
    return bytes(changed)


TIFF: tuple[Mutation, ...] = (
    _with_tag(_WIDTH, _LENGTH),
    _with_tag(_WIDTH),
    _with_tag(_LENGTH),
    _with_tag(_BITS, values=(0, 1, 4, 12, 16, 32, 64, 65535)),
    _with_tag(_SAMPLES, values=(0, 1, 2, 4, 5, 255, 65535)),
    _with_tag(_PHOTOMETRIC, values=(0, 1, 2, 3, 4, 5, 6, 8, 32844, 65535)),
    _with_tag(_COMPRESSION, values=(0, 1, 2, 3, 4, 5, 6, 7, 8, 32773, 33003, 33005, 34712, 50000)),
    _with_tag(_TILE_WIDTH, _TILE_LENGTH),
    _with_tag(_TILE_WIDTH),
    _with_tag(_TILE_OFFSETS),
    _with_tag(_TILE_BYTES),
    _with_tag(_PLANAR, _PREDICTOR, values=(0, 1, 2, 3, 65535)),
    _with_tag(_DESCRIPTION),
    *(cyclic_directories, huge_counts, unknown_types, many_directory_entries),
    *(directory_elsewhere, compressed_garbage),
)


# DICOM

_EMPTY_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)


def _film(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def _stored(film: pydicom.Dataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, film, enforce_file_format=False)
    return stream.getvalue()


def _with_element(keyword: str, values: tuple[object, ...]) -> Mutation:
    def mutate(content: bytes, rng: np.random.Generator) -> bytes:
        film = _film(content)
        setattr(film, keyword, values[rng.integers(len(values))])
        return _stored(film)

    mutate.__name__ = f"element_{keyword}"
    return mutate


def absurd_size(content: bytes, rng: np.random.Generator) -> bytes:
    film = _film(content)
    film.Rows = film.Columns = int(rng.choice((0, 1, 32768, 65535)))
    return _stored(film)


def no_pixels(content: bytes, rng: np.random.Generator) -> bytes:
    film = _film(content)
    is_compressed = film.file_meta.TransferSyntaxUID.is_compressed
    film.PixelData = _EMPTY_ITEM * int(rng.integers(1, 4)) if is_compressed else b""
    return _stored(film)


def another_transfer_syntax(content: bytes, rng: np.random.Generator) -> bytes:
    film = _film(content)
    syntaxes = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.80")
    syntaxes += (JPEGLosslessSV1, RLELossless, "1.2.840.10008.1.2.4.201", "1.2.3")
    data = film.PixelData
    if not film.file_meta.TransferSyntaxUID.is_compressed:
        data = encapsulate([data])
    film.PixelData, film["PixelData"].is_undefined_length = data, True
    film.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntaxes[rng.integers(len(syntaxes))])
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, film, implicit_vr=False, little_endian=True, enforce_file_format=False)
    return stream.getvalue()


def compressed_noise(content: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite the last part of the file, which is pixels, with noise."""
    n_kept = len(content) - int(rng.integers(1, max(2, len(content) // 2)))
    return content[:n_kept] + rng.bytes(len(content) - n_kept)


def nested_sequences(content: bytes, rng: np.random.Generator) -> bytes:
    """Put sequences of undefined length inside each other, thousands deep, before the pixels."""
    depth = int(rng.integers(100, 5000))
    sequence = struct.pack("<HH2sHI", 0x0028, 0x3010, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return _before_pixels(content, (sequence + item) * depth)


def endless_element(content: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.choice((2**20, 2**31, 2**32 - 2, 2**32 - 1)))
    return _before_pixels(content, struct.pack("<HH2sHI", 0x0028, 0x1201, b"OW", 0, length))


def inflates_without_end(content: bytes, rng: np.random.Generator) -> bytes:
    """A deflated data set of a few kilobytes that inflates to gigabytes."""
    film = _film(content)
    film.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    del film.PixelData
    head = _stored(film)
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    # Behind a full flush nothing refers back: the same zeros are the same bytes each time.
    element = struct.pack("<HH2sHI", 0x0028, 0x1201, b"OW", 0, 2**32 - 2)
    packed = bomb.compress(element) + bomb.flush(zlib.Z_FULL_FLUSH)
    zeros = bomb.compress(bytes(2**24)) + bomb.flush(zlib.Z_FULL_FLUSH)
    packed += zeros * int(rng.choice((64, 300)))
    return head[: 132 + 12 + film.file_meta.FileMetaInformationGroupLength] + packed + bomb.flush()


def _before_pixels(content: bytes, inserted: bytes) -> bytes:
    at = content.rfind(struct.pack("<HH", 0x7FE0, 0x0010))
    return content[:at] + inserted + content[at:]


DICOM: tuple[Mutation, ...] = (
    absurd_size,
    _with_element("BitsAllocated", (0, 1, 8, 12, 32, 64, 65535)),
    _with_element("BitsStored", (0, 1, 8, 17, 255, 65535)),
    _with_element("HighBit", (0, 7, 200, 65535)),
    _with_element("PixelRepresentation", (1, 2, 65535)),
    _with_element("SamplesPerPixel", (0, 2, 3, 65535)),
    _with_element("PhotometricInterpretation", ("RGB", "YBR_FULL", "PALETTE COLOR", "", "X" * 16)),
    _with_element("NumberOfFrames", ("0", "-1", "2", "2147483647")),
    _with_element("WindowWidth", ("0", "-1", "1e300", ["1", "2"])),
    _with_element("WindowCenter", ("1e300", "-1e300", ["1"] * 100)),
    _with_element("RescaleSlope", ("0", "1e300", "-1e300")),
    _with_element("PixelSpacing", (["0", "0"], ["-1", "1"], ["1"] * 3, ["1e-300", "1e300"])),
    *(no_pixels, another_transfer_syntax, compressed_noise, nested_sequences, endless_element),
    inflates_without_end,
)


# Whole files to begin with


def svs_like(pixels: np.ndarray) -> bytes:
    """Return an Aperio file as OpenSlide tells one: tiles, and a description that begins so."""
    size_px = len(pixels)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as tiff:
        for step in (1, 4):
            level = np.ascontiguousarray(pixels[::step, ::step])
            tiff.write(
                level,
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                description=(
                    f"Aperio Image Library v11.2.1\n{size_px}x{size_px} (128x128) -> "
                    f"{len(level)}x{len(level)} JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
                ),
                metadata=None,
            )
    return stream.getvalue()


def plain_tiff(pixels: np.ndarray, compression: str | None) -> bytes:
    """Return a tiled TIFF of one level."""
    stream = io.BytesIO()
    tifffile.imwrite(
        stream,
        pixels,
        tile=(128, 128),
        photometric="rgb",
        compression=compression,
        metadata=None,
    )
    return stream.getvalue()


def compressed_films(path: Path) -> list[bytes]:
    """Return the film at `path` in the compressed transfer syntaxes that can be written here."""
    films = []
    for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        film = pydicom.dcmread(path)
        film.compress(syntax, generate_instance_uid=False)
        films.append(_stored(film))
    return films
