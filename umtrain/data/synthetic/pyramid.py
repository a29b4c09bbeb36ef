"""Writes a pyramidal, tiled JPEG TIFF from strips, so that no level has to fit in memory at once.

OpenSlide takes consecutive pages with the reduced-image bit set as levels, not pages in SubIFDs.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from umtrain.data.synthetic.tissue import Stains

TILE_PX = 256
_SMALLEST_LEVEL_PX = 256
_JPEG_QUALITY = 85


def write_pyramid(
    path: Path, strips: Iterator[Stains], size_px: int, mpp: float, threads: int
) -> None:
    """Write `strips` (uint8 RGB, multiples of 256 rows but the last) as a square slide at `path`.

    Each level has half the side of the one before. `mpp`, in microns per pixel, is stored as the
    resolution in centimetres that OpenSlide reports as `openslide.mpp-x` and `-y`.
    """
    level = _HalvedStrips(strips, size_px)
    is_reduced = False
    with tifffile.TiffWriter(path) as tiff:
        while True:
            tiff.write(
                level.tiles(),
                shape=(level.size_px, level.size_px, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                # RGB inside the JPEG: OpenSlide shows wrong colours for tifffile's YCbCr.
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                subfiletype=int(is_reduced),
                resolution=(1e4 / mpp * level.size_px / size_px,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
                maxworkers=threads,
            )
            if level.size_px // 2 < _SMALLEST_LEVEL_PX:
                return
            level = level.halved()
            is_reduced = True


class _HalvedStrips:
    """One level's strips, which gathers the level of half the side while they are read."""

    def __init__(self, strips: Iterator[Stains], size_px: int) -> None:
        self.size_px = size_px
        self._strips = strips
        half_px = size_px // 2
        self._half = np.empty((half_px, half_px, 3), dtype=np.uint8)

    def tiles(self) -> Iterator[Stains]:
        """Yield the level's tiles in the file's order, those at the edges as they are cut."""
        top = 0
        for strip in self._strips:
            rows = self._half[top // 2 : (top + len(strip)) // 2]
            if len(rows):
                even = strip[: 2 * len(rows), : 2 * len(self._half)]
                rows[...] = np.asarray(Image.fromarray(even).reduce(2))
            top += len(strip)
            for row in range(0, len(strip), TILE_PX):
                for column in range(0, self.size_px, TILE_PX):
                    yield strip[row : row + TILE_PX, column : column + TILE_PX]

    def halved(self) -> "_HalvedStrips":
        """Return the next level; only once all tiles have been read."""
        half = self._half
        bands = (half[top : top + 2 * TILE_PX] for top in range(0, len(half), 2 * TILE_PX))
        return _HalvedStrips(bands, len(half))
