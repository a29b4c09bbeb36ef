"""Whole slides: any file OpenSlide reads, as the square the network sees.

Frames: `l0_` is pixels of the slide's level 0, `level_` pixels of the pyramid level that is read,
`out_` pixels of the square that is returned. A pixel covers [i, i + 1) on each axis.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from umtrain.errors import DataError

FITS = ("resize", "pad", "crop")
WHITE = 255

# A level a hair coarser than the target still has every detail of it: a pyramid whose sides do
# not divide evenly reports a downsample of 4.0003 where 4 is meant.
_LEVEL_TOLERANCE = 1.005
_MPP_TOLERANCE = 0.01
_STRIP_BYTES = 4 * 2**20
_CACHE_BYTES_MIN = 64 * 2**20
_CACHE_BYTES_MAX = 256 * 2**20
_N_READERS = 2
_RGBA_BYTES = 4


@dataclass(frozen=True)
class SlideInfo:
    """What a slide's header says: sides in level-0 pixels, pyramid, microns per pixel, scanner.

    `qupath_origin_px` is the level-0 place that QuPath counts from: it crops a slide to the bounds
    of what was scanned, where the header states them.
    """

    width_px: int
    height_px: int
    level_downsamples: tuple[float, ...]
    mpp: float | None
    vendor: str
    qupath_origin_px: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class SlideFrame:
    """Where the output square lies on the slide: l0 = origin + scale * out, on both axes.

    `scale` is level-0 pixels per output pixel; below 1 the slide is enlarged, which adds no detail.
    """

    l0_x: float
    l0_y: float
    scale: float

    def to_l0(self, out_x: float, out_y: float) -> tuple[float, float]:
        """Return the level-0 position of a position in the output square."""
        return self.l0_x + self.scale * out_x, self.l0_y + self.scale * out_y

    def to_out(self, l0_x: float, l0_y: float) -> tuple[float, float]:
        """Return the position in the output square of a level-0 position."""
        return (l0_x - self.l0_x) / self.scale, (l0_y - self.l0_y) / self.scale

    @property
    def enlarges(self) -> bool:
        """Whether an output pixel is smaller than a pixel of the slide."""
        return self.scale < 1


def slide_info(path: Path) -> SlideInfo:
    """Return what the header of the slide at `path` says.

    `mpp` is None where the file has none, or has pixels that are not square.
    Raises DataError if the file is missing or no slide.
    """
    with _opened(path) as slide:
        return _info(slide)


def plan_frame(
    info: SlideInfo, res: int, fit: str, target_mpp: float | None, slide_mpp: float | None
) -> SlideFrame:
    """Return where a square of `res` pixels lies on a slide.

    `resize` scales the longest side to `res`, centred. `pad` centres the whole slide at
    `target_mpp`; `crop` takes the centre of the slide at `target_mpp`. `slide_mpp` (microns per
    level-0 pixel) wins over the file's own.
    Raises DataError if the fit is unknown, a needed mpp is not known, or a slide to pad is too big.
    """
    longest_px = max(info.width_px, info.height_px)
    if fit == "resize":
        scale = longest_px / res
    elif fit in FITS:
        scale = _scale_at_mpp(info, fit, target_mpp, slide_mpp)
    else:
        raise DataError(f"dataset.fit={fit} is unknown; choose one of {', '.join(FITS)}")
    needed_px = math.ceil(longest_px / scale - 1e-6)
    if fit == "pad" and needed_px > res:
        raise DataError(
            f"the slide is {info.width_px}×{info.height_px} px, which at "
            f"dataset.mpp={target_mpp:g} needs res={needed_px}, but res={res}; raise res to "
            f"{needed_px}, take a coarser dataset.mpp, or use dataset.fit=crop or resize"
        )
    return SlideFrame(
        l0_x=(info.width_px - res * scale) / 2,
        l0_y=(info.height_px - res * scale) / 2,
        scale=scale,
    )


def best_level(level_downsamples: tuple[float, ...], scale: float) -> int:
    """Return the coarsest level that is no coarser than `scale` (l0 px per px); else level 0."""
    fine_enough = [
        level
        for level, downsample in enumerate(level_downsamples)
        if downsample <= scale * _LEVEL_TOLERANCE
    ]
    return max(fine_enough, key=lambda level: level_downsamples[level], default=0)


def read_slide(
    path: Path,
    res: int,
    *,
    fit: str = "resize",
    mpp: float | None = None,
    slide_mpp: float | None = None,
    strip_rows: int | None = None,
) -> tuple[np.ndarray, SlideFrame]:
    """Return the slide as a square image, and the frame that places it on the slide.

    The image is uint8 (res, res, 3), RGB, white wherever the slide has no pixels. It is read from
    the coarsest pyramid level that still has all its detail, in strips of `strip_rows` output rows
    (None: what fits in a few MiB), each resampled with an antialiasing filter as the whole
    would be. `fit`, `mpp` (the target's) and `slide_mpp` are those of `plan_frame`.
    Raises DataError, naming the file, if it cannot be read or does not fit.
    """
    with _opened(path) as slide:
        info = _info(slide)
        try:
            frame = plan_frame(info, res, fit, mpp, slide_mpp)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        reader = _LevelReader(slide, info, frame, res)
        image = np.full((res, res, 3), WHITE, dtype=np.uint8)
        strips = reader.strips(strip_rows)
        # OpenSlide and Pillow release the GIL: one strip decodes while another is resampled.
        with ThreadPoolExecutor(_N_READERS) as readers:
            for _ in readers.map(lambda strip: reader.read_into(image, *strip), strips):
                pass
    return image, frame


class _LevelReader:
    """Reads strips of the output square from the one pyramid level that suits its scale."""

    def __init__(
        self, slide: openslide.OpenSlide, info: SlideInfo, frame: SlideFrame, res: int
    ) -> None:
        self.slide = slide
        self.level = best_level(info.level_downsamples, frame.scale)
        self.downsample = info.level_downsamples[self.level]
        self.ratio = frame.scale / self.downsample
        self.frame = frame
        self.out_x = _covered(frame.l0_x, frame.scale, info.width_px, res)
        self.out_y = _covered(frame.l0_y, frame.scale, info.height_px, res)
        enlarges = self.ratio < 1
        self.filter = Image.Resampling.BILINEAR if enlarges else Image.Resampling.HAMMING
        # Both filters reach one source pixel when enlarging and one output pixel when shrinking;
        # one pixel more covers the rounding of the window to whole level-0 pixels.
        self.halo_px = math.ceil(max(self.ratio, 1.0)) + 1
        slide.set_cache(openslide.OpenSlideCache(self._cache_bytes()))

    def strips(self, strip_rows: int | None) -> Iterator[tuple[int, int]]:
        """Yield the (first, past-last) output rows of each strip that the slide reaches into."""
        row_bytes = (self.out_x[1] - self.out_x[0]) * self.ratio**2 * _RGBA_BYTES
        n_rows = strip_rows or max(1, int(_STRIP_BYTES / max(row_bytes, 1.0)))
        for first in range(*self.out_y, n_rows):
            yield first, min(first + n_rows, self.out_y[1])

    def read_into(self, image: np.ndarray, first: int, last: int) -> None:
        """Fill rows `first` to `last` (exclusive) of the (res, res, 3) uint8 `image`."""
        columns = slice(*self.out_x)
        size = (self.out_x[1] - self.out_x[0], last - first)
        x0, width, left, right = self._window(self.frame.l0_x, *self.out_x)
        y0, height, top, bottom = self._window(self.frame.l0_y, first, last)
        source = self.slide.read_region((x0, y0), self.level, (width, height))
        rgb = _on_white(source)
        del source
        image[first:last, columns] = rgb.resize(size, self.filter, box=(left, top, right, bottom))

    def _window(self, l0_origin: float, first: int, last: int) -> tuple[int, int, float, float]:
        """Return, for one axis, the l0 start and level size to read, and the box inside them."""
        begin = l0_origin / self.downsample + self.ratio * first
        end = l0_origin / self.downsample + self.ratio * last
        l0_start = round((math.floor(begin) - self.halo_px) * self.downsample)
        level_start = l0_start / self.downsample
        size = math.ceil(end - level_start) + self.halo_px
        return l0_start, size, begin - level_start, end - level_start

    def _cache_bytes(self) -> int:
        """Two rows of tiles: what neighbouring strips share is then decoded once."""
        prefix = f"openslide.level[{self.level}]."
        tile_rows = int(self.slide.properties.get(prefix + "tile-height", 256))
        level_width = int(self.slide.level_dimensions[self.level][0])
        n_bytes = 2 * tile_rows * level_width * _RGBA_BYTES
        return min(max(n_bytes, _CACHE_BYTES_MIN), _CACHE_BYTES_MAX)


@contextmanager
def _opened(path: Path) -> Iterator[openslide.OpenSlide]:
    """Open a slide for the body; OpenSlide's errors come out as DataError naming the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such slide file; correct the manifest's path or dataset.root")
    try:
        with openslide.OpenSlide(path) as slide:
            yield slide
    except openslide.OpenSlideUnsupportedFormatError:
        raise DataError(
            f"{path}: not a slide that OpenSlide {openslide.__library_version__} can read; "
            f"expected a pyramidal file such as SVS, NDPI, MRXS, SCN or tiled TIFF; convert it, "
            f"for example with `vips tiffsave --tile --pyramid`"
        ) from None
    except openslide.OpenSlideError as error:
        raise DataError(
            f"{path}: OpenSlide cannot read this slide: {error}; the file is damaged or "
            f"incomplete, copy it again or leave it out of the manifest"
        ) from error


def _info(slide: openslide.OpenSlide) -> SlideInfo:
    width_px, height_px = slide.dimensions
    return SlideInfo(
        width_px=width_px,
        height_px=height_px,
        level_downsamples=tuple(slide.level_downsamples),
        mpp=_square_mpp(slide.properties),
        vendor=slide.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        qupath_origin_px=_qupath_origin_px(slide.properties, slide.dimensions),
    )


def _qupath_origin_px(properties: Mapping[str, str], size_px: tuple[int, int]) -> tuple[int, int]:
    """Return the corner of the bounds, if all four are stated and smaller than the slide."""
    try:
        x, y, width, height = (
            int(properties[name])
            for name in (
                openslide.PROPERTY_NAME_BOUNDS_X,
                openslide.PROPERTY_NAME_BOUNDS_Y,
                openslide.PROPERTY_NAME_BOUNDS_WIDTH,
                openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
            )
        )
    except (KeyError, ValueError):
        return 0, 0
    return (x, y) if width != size_px[0] and height != size_px[1] else (0, 0)


def _square_mpp(properties: Mapping[str, str]) -> float | None:
    """Return the mean of the two axes' microns per pixel, None if absent or not nearly equal."""
    try:
        mpp_x = float(properties[openslide.PROPERTY_NAME_MPP_X])
        mpp_y = float(properties[openslide.PROPERTY_NAME_MPP_Y])
    except (KeyError, ValueError):
        return None
    if min(mpp_x, mpp_y) <= 0 or abs(mpp_x - mpp_y) > _MPP_TOLERANCE * mpp_x:
        return None
    return (mpp_x + mpp_y) / 2


def _scale_at_mpp(
    info: SlideInfo, fit: str, target_mpp: float | None, slide_mpp: float | None
) -> float:
    if target_mpp is None:
        raise DataError(f"dataset.fit={fit} needs dataset.mpp, the microns per pixel to read at")
    own_mpp = slide_mpp if slide_mpp is not None else info.mpp
    if own_mpp is None:
        raise DataError(
            f"dataset.fit={fit} needs the slide's microns per pixel, and the file does not state "
            f"them; add them to the manifest's mpp column, or use dataset.fit=resize"
        )
    if own_mpp <= 0 or target_mpp <= 0:
        raise DataError(
            f"microns per pixel must be positive, got dataset.mpp={target_mpp:g} and "
            f"{own_mpp:g} for the slide; correct dataset.mpp or the manifest's mpp column"
        )
    return target_mpp / own_mpp


def _covered(l0_origin: float, scale: float, slide_px: int, res: int) -> tuple[int, int]:
    """Return, for one axis, the (first, past-last) output pixels that touch the slide."""
    first = math.floor(-l0_origin / scale + 1e-6)
    last = math.ceil((slide_px - l0_origin) / scale - 1e-6)
    return max(first, 0), min(last, res)


def _on_white(source: Image.Image) -> Image.Image:
    """Return an RGBA image as RGB over white."""
    rgb = source.convert("RGB")
    alpha = source.getchannel("A")
    if alpha.getextrema()[0] == WHITE:
        return rgb
    canvas = Image.new("RGB", source.size, (WHITE, WHITE, WHITE))
    canvas.paste(rgb, mask=alpha)
    return canvas
