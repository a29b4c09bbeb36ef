"""The JPEG processes that pydicom has no freely licensed codec for, through imagecodecs.

pydicom reads lossless JPEG and 12-bit JPEG only with a GPL package or with GDCM. Lossless JPEG is
what most archives keep radiographs in, and imagecodecs (a dependency already) carries
libjpeg-turbo, which decodes both. This module is a pydicom decoding plugin: pydicom calls
`is_available` and `decode_frame` by name.
"""

from functools import cache
from typing import Any

import imagecodecs
from pydicom.pixels.decoders import (
    JPEGExtended12BitDecoder,
    JPEGLosslessDecoder,
    JPEGLosslessSV1Decoder,
)

_DECODERS = (JPEGExtended12BitDecoder, JPEGLosslessDecoder, JPEGLosslessSV1Decoder)
_DEPENDENCIES = ("imagecodecs>=2025.3.30, built with libjpeg-turbo 3",)

_END_OF_IMAGE = b"\xff\xd9"
_PADDING_BYTES = 16  # a frame is padded to an even length; some writers pad to a word or two

DECODER_DEPENDENCIES = {decoder.UID: _DEPENDENCIES for decoder in _DECODERS}


@cache
def register() -> None:
    """Add this module to pydicom's decoders, once in a process."""
    for decoder in _DECODERS:
        decoder.add_plugin("imagecodecs", (__name__, "decode_frame"))


def is_available(uid: str) -> bool:
    """Return whether transfer syntax `uid` can be decoded here."""
    return uid in DECODER_DEPENDENCIES and bool(imagecodecs.JPEG8.available)


def decode_frame(src: bytes, runner: Any) -> bytes:
    """Return the little-endian samples of one encoded frame (PS3.5, A.4.1).

    Raises ValueError if the frame is cut short: libjpeg would make up the rest.
    """
    if _END_OF_IMAGE not in src[-_PADDING_BYTES:]:
        raise ValueError("the JPEG stream has no end-of-image marker")
    samples = imagecodecs.jpeg8_decode(src)
    # A container wider or narrower than the header says is told to pydicom, which then widens it.
    runner.set_option("bits_allocated", 8 * samples.dtype.itemsize)
    return bytes(samples.astype(samples.dtype.newbyteorder("<"), copy=False).tobytes())
