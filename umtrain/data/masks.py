"""Masks of slides: which pixels are benign tissue and which are cancer, and what that makes of a
patch.

A mask is an 8-bit PNG that covers its whole slide at any whole-number downsample: 0 background,
1 benign tissue, 2 cancer. A mask pixel covers downsample × downsample level-0 pixels.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from umtrain.data.manifest import Slide
from umtrain.data.wsi import SlideInfo, slide_info
from umtrain.errors import DataError

CLASSES = ("background", "benign", "cancer")
BACKGROUND, BENIGN, CANCER = range(len(CLASSES))
MASK_TEXT = (
    "a mask is an 8-bit PNG that covers the slide at any whole-number downsample: 0 background, "
    "1 benign tissue, 2 cancer"
)
# A patch is cancer if that share of it is: a square of an eighth of the patch's side. With less
# tissue than the other share it is background.
CANCER_SHARE = 1 / 64
TISSUE_SHARE = 1 / 20

_MODES = ("L", "P", "1")


@dataclass(frozen=True)
class SlideMask:
    """What is known of a slide: `classes`, uint8 (rows, columns), pixels of the mask."""

    classes: NDArray[np.uint8]
    downsample: int

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The classes that occur, in order."""
        return tuple(np.flatnonzero(self._row_counts.sum(axis=1)).tolist())

    @cached_property
    def _row_counts(self) -> NDArray[np.int64]:
        """How many pixels of each class each row has: (classes, rows)."""
        counts = [(self.classes == number).sum(axis=1) for number in range(len(CLASSES))]
        return np.stack(counts)

    def draw(self, wanted: int, rng: np.random.Generator) -> tuple[float, float]:
        """Return a level-0 point (x, y), evenly drawn from where the mask has class `wanted`."""
        counts = self._row_counts[wanted]
        row = rng.choice(len(counts), p=counts / counts.sum())
        column = rng.choice(np.flatnonzero(self.classes[row] == wanted))
        return (
            (float(column) + rng.random()) * self.downsample,
            (float(row) + rng.random()) * self.downsample,
        )

    def shares(self, l0_x: float, l0_y: float, l0_side: float) -> NDArray[np.float64]:
        """Return the share that each class has of a square of the slide: float64 (classes,).

        The square's upper left corner is at (l0_x, l0_y). What lies outside is background.
        """
        rows, heights = _overlap(l0_y, l0_side, self.downsample, self.classes.shape[0])
        columns, widths = _overlap(l0_x, l0_side, self.downsample, self.classes.shape[1])
        window = self.classes[rows, columns]
        benign, cancer = (
            float(heights @ (window == number) @ widths) / l0_side**2 for number in (BENIGN, CANCER)
        )
        return np.array([1 - benign - cancer, benign, cancer])

    def patch_class(self, l0_x: float, l0_y: float, l0_side: float) -> int:
        """Return the class of a square: cancer from 1/64 of it on, background below 1/20 tissue."""
        _, benign, cancer = self.shares(l0_x, l0_y, l0_side)
        if cancer >= CANCER_SHARE:
            return CANCER
        return BENIGN if benign + cancer >= TISSUE_SHARE else BACKGROUND


def read_mask(path: Path, info: SlideInfo) -> SlideMask:
    """Return the mask at `path` of the slide that `info` describes.

    Raises DataError, naming the file, if it is missing, unreadable or no mask of this slide.
    """
    try:
        with _opened(path) as image:
            downsample = _checked(image, path, info)
            classes = np.array(image, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such mask; correct the manifest's mask or dataset.root"
        ) from None
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not readable as a mask ({error}); {MASK_TEXT}") from error
    if classes.max(initial=0) > CANCER:
        found = ", ".join(map(str, np.unique(classes)[:10]))
        raise DataError(f"{path}: has the values {found}; {MASK_TEXT}")
    return SlideMask(classes, downsample)


def check_mask(path: Path, info: SlideInfo) -> None:
    """Raise DataError, as `read_mask` does, for what the mask's header tells; reads no more."""
    try:
        with _opened(path) as image:
            _checked(image, path, info)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not readable as a mask ({error}); {MASK_TEXT}") from error


def check_mask_of(slide: Slide) -> None:
    """Raise DataError as `check_mask` does for a slide's mask; not if the slide is unreadable."""
    assert slide.mask is not None
    try:
        info = slide_info(slide.path)
    except DataError:
        return
    check_mask(slide.mask, info)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture of any size: it is compared with its slide's before it is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _checked(image: Image.Image, path: Path, info: SlideInfo) -> int:
    """Return the downsample of a mask; raises DataError unless it is one of the slide."""
    if image.mode not in _MODES:
        raise DataError(f"{path}: got pixels of mode {image.mode}; {MASK_TEXT}")
    return _downsample(path, (image.height, image.width), info)


def _downsample(path: Path, shape: tuple[int, ...], info: SlideInfo) -> int:
    """Return the whole number that scales a mask of `shape` to the slide.

    The last row and column may be cut off or filled up. Where several numbers fit, as they do with
    a small mask, a power of two is likelier.
    """
    sides = ((info.width_px, shape[1]), (info.height_px, shape[0]))
    ratio = max(slide_px / mask_px for slide_px, mask_px in sides)
    fitting = [
        number
        for number in range(max(1, int(ratio / 2)), int(2 * ratio) + 2)
        if all(mask_px in (n_px // number, -(-n_px // number)) for n_px, mask_px in sides)
    ]
    if not fitting:
        raise DataError(
            f"{path}: is {shape[1]}×{shape[0]} px and its slide {info.width_px}×{info.height_px}, "
            f"which is no whole-number downsample of it; {MASK_TEXT}"
        )
    return min(fitting, key=lambda number: (number.bit_count() > 1, abs(number - ratio)))


def _overlap(
    l0_start: float, l0_side: float, downsample: int, n_pixels: int
) -> tuple[slice, NDArray[np.float64]]:
    """Return, for one axis, the mask pixels under [start, start + side), and how much of each."""
    first = min(max(int(l0_start // downsample), 0), n_pixels)
    last = min(max(int(-(-(l0_start + l0_side) // downsample)), first), n_pixels)
    edges = np.clip(np.arange(first, last + 1) * downsample, l0_start, l0_start + l0_side)
    return slice(first, last), np.diff(edges).astype(np.float64)
