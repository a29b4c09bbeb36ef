"""Patches of slides: the grid they lie on, how they are drawn by masks, and how they are read.

Frames: `l0_` is pixels of the slide's level 0, `out_` pixels of the patch as the network sees it;
a cell is a place of the grid.
"""

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import openslide
import torch
from numpy.typing import NDArray
from PIL import Image

from umtrain.data.augment import SlideAugment
from umtrain.data.dataset import SampleKey, SlideDataset, SlideSample, sample_rng
from umtrain.data.manifest import Slide
from umtrain.data.masks import MASK_TEXT, SlideMask, read_mask
from umtrain.data.tissue import find_tissue
from umtrain.data.wsi import WHITE, SlideFrame, SlideInfo, best_level, slide_info
from umtrain.errors import DataError

# What a patch is wanted for is not what a mask says of it wherever its centre lies: try again.
_N_TRIES = 8
# Tissue is looked for in a picture with so many pixels a patch, but not in a larger one than this.
_TISSUE_PX_PER_PATCH = 8
_TISSUE_PX_MAX = 2048
_N_OPEN = 16
_CACHE_BYTES = 64 * 2**20


class Patch(NamedTuple):
    """A square of a slide: its upper left corner in level-0 pixels, and its class."""

    l0_x: int
    l0_y: int
    label: int


@dataclass(frozen=True)
class PatchGrid:
    """Squares of `l0_side` level-0 pixels, edge to edge, from the slide's upper left corner on.

    The last row and column reach beyond the slide where its sides are no multiples.
    """

    l0_side: float
    n_rows: int
    n_columns: int

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return the upper left corner (x, y) of a cell, to the nearest level-0 pixel."""
        return round(column * self.l0_side), round(row * self.l0_side)

    @property
    def frame(self) -> SlideFrame:
        """Where the grid lies on the slide: a cell is a pixel."""
        return SlideFrame(0.0, 0.0, self.l0_side)

    def cells(self, tissue: NDArray[np.bool_], frame: SlideFrame) -> NDArray[np.bool_]:
        """Return which cells a pixel of `tissue` reaches into: bool (n_rows, n_columns).

        `tissue` is bool (rows, columns), and `frame` places it on the slide.
        """
        rows = self._reached(frame.l0_y, frame.scale, tissue.shape[0], self.n_rows)
        columns = self._reached(frame.l0_x, frame.scale, tissue.shape[1], self.n_columns)
        reached: NDArray[np.bool_] = rows @ tissue.astype(np.float32) @ columns.T > 0
        return reached

    def _reached(
        self, l0_start: float, scale: float, n_pixels: int, n_cells: int
    ) -> NDArray[np.float32]:
        """Return, for one axis, 1 where a pixel overlaps a cell: (n_cells, n_pixels)."""
        begin = l0_start + scale * np.arange(n_pixels)
        cell = self.l0_side * np.arange(n_cells)[:, None]
        return ((begin < cell + self.l0_side) & (begin + scale > cell)).astype(np.float32)


def plan_grid(info: SlideInfo, l0_side: float) -> PatchGrid:
    """Return the grid of squares of `l0_side` that covers a slide."""
    n_rows, n_columns = (
        max(1, math.ceil(side_px / l0_side - 1e-6)) for side_px in (info.height_px, info.width_px)
    )
    return PatchGrid(l0_side, n_rows, n_columns)


def patch_scale(slide: Slide, info: SlideInfo, mpp: float | None) -> float:
    """Return level-0 pixels per pixel of a patch at `mpp` microns per pixel; None: level 0's own.

    Raises DataError if neither the manifest nor the file states the slide's microns per pixel.
    """
    if mpp is None:
        return 1.0
    own_mpp = slide.mpp if slide.mpp is not None else info.mpp
    if own_mpp is None:
        raise DataError(
            f"{slide.path}: dataset.mpp={mpp:g} needs the slide's microns per pixel, and the file "
            "does not state them; add them to the manifest's mpp column, or leave dataset.mpp out "
            "to read level 0"
        )
    return mpp / own_mpp


def draw_patch(
    mask: SlideMask, info: SlideInfo, l0_side: float, wanted: int, rng: np.random.Generator
) -> Patch:
    """Return a square around a point whose mask pixel is of class `wanted`.

    It lies within the slide where that is large enough. Its label is what the mask says of the
    whole square, which is `wanted` unless several draws in turn had another.
    """
    for _ in range(_N_TRIES):
        centre_x, centre_y = mask.draw(wanted, rng)
        l0_x, l0_y = (
            round(min(max(centre - l0_side / 2, 0), max(side_px - l0_side, 0)))
            for centre, side_px in ((centre_x, info.width_px), (centre_y, info.height_px))
        )
        label = mask.patch_class(l0_x, l0_y, l0_side)
        if label == wanted:
            break
    return Patch(l0_x, l0_y, label)


class PatchReader:
    """One open slide, and its patches of `res` pixels at `mpp` (None: those of level 0).

    Raises DataError, naming the file, if it cannot be read or its microns per pixel are not known.
    """

    def __init__(
        self, slide: Slide, res: int, mpp: float | None, cache: openslide.OpenSlideCache
    ) -> None:
        self.info = slide_info(slide.path)
        self._slide, self._res = slide, res
        scale = patch_scale(slide, self.info, mpp)
        self.l0_side = res * scale
        self._level = best_level(self.info.level_downsamples, scale)
        self._level_side = self.l0_side / self.info.level_downsamples[self._level]
        self._handle = openslide.OpenSlide(slide.path)
        self._handle.set_cache(cache)

    @cached_property
    def mask(self) -> SlideMask:
        """The slide's mask."""
        if self._slide.mask is None:
            raise DataError(f"{self._slide.path}: the manifest names no mask of it; {MASK_TEXT}")
        return read_mask(self._slide.mask, self.info)

    def read(self, l0_x: int, l0_y: int) -> NDArray[np.uint8]:
        """Return the patch at (l0_x, l0_y): uint8 (res, res, 3), white where there is no slide."""
        source_px = math.ceil(self._level_side - 1e-6)
        try:
            source = self._handle.read_region((l0_x, l0_y), self._level, (source_px, source_px))
        except openslide.OpenSlideError as error:
            raise DataError(
                f"{self._slide.path}: OpenSlide cannot read this slide: {error}; the file is "
                "damaged or incomplete, copy it again or leave it out of the manifest"
            ) from error
        rgb = Image.new("RGB", source.size, (WHITE, WHITE, WHITE))
        rgb.paste(source, mask=source.getchannel("A"))
        if self._level_side != self._res:
            enlarges = self._level_side < self._res
            resampling = Image.Resampling.BILINEAR if enlarges else Image.Resampling.HAMMING
            box = (0.0, 0.0, self._level_side, self._level_side)
            rgb = rgb.resize((self._res, self._res), resampling, box=box)
        return np.array(rgb)

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


class _Readers:
    """Readers of the slides that were read last: opening a slide can take as long as a patch."""

    def __init__(self, res: int, mpp: float | None) -> None:
        self._res, self._mpp = res, mpp
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)
        self._open: OrderedDict[str, PatchReader] = OrderedDict()

    def get(self, slide: Slide) -> PatchReader:
        """Return the reader of `slide`, opened if it is not."""
        if slide.id in self._open:
            self._open.move_to_end(slide.id)
        else:
            self._open[slide.id] = PatchReader(slide, self._res, self._mpp, self._cache)
            if len(self._open) > _N_OPEN:
                self._open.popitem(last=False)[1].close()
        return self._open[slide.id]


class _PatchSource(SlideDataset):
    """What datasets of patches share: slides that are opened where, and when, they are read."""

    @cached_property
    def _readers(self) -> _Readers:
        return _Readers(self._res, self._mpp)

    def _sample(
        self, slide: Slide, pixels: NDArray[np.uint8], label: int, index: int
    ) -> SlideSample:
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return SlideSample(image=image, label=label, id=slide.id, index=index)


class PatchDataset(_PatchSource):
    """Patches drawn by the slides' masks, `per_slide` of each slide, new ones in every epoch.

    The classes that a slide's mask has take turns, so that all are drawn equally often; `label` is
    the class of the patch. `records` has the slide of each patch. `res`, `mpp`: see `PatchReader`.
    """

    def __init__(
        self,
        slides: Sequence[Slide],
        res: int,
        *,
        per_slide: int,
        mpp: float | None = None,
        augment: SlideAugment | None = None,
        seed: int = 0,
    ) -> None:
        records = [slide for slide in slides for _ in range(per_slide)]
        super().__init__(records, {}, res, mpp=mpp, augment=augment, seed=seed)
        self._per_slide = per_slide

    def __getitem__(self, key: SampleKey) -> SlideSample:
        """Draw, read and augment one patch; DataError if slide or mask cannot be read."""
        slide = self.records[key.position]
        reader = self._readers.get(slide)
        rng = sample_rng(self._seed, key)
        patch = draw_patch(reader.mask, reader.info, reader.l0_side, self._wanted(key, reader), rng)
        pixels = reader.read(patch.l0_x, patch.l0_y)
        if self._augment is not None:
            pixels = self._augment(pixels, rng)
        return self._sample(slide, pixels, patch.label, key.position)

    def _wanted(self, key: SampleKey, reader: PatchReader) -> int:
        """Return whose turn it is; over the epochs too, should a slide have few patches in each."""
        present = reader.mask.present
        n_drawn = key.epoch * self._per_slide + key.position % self._per_slide
        return present[n_drawn % len(present)]


@dataclass(frozen=True)
class GridPlan:
    """The grid of one slide, and its cells that have tissue: int (n, 2), rows and columns."""

    grid: PatchGrid
    cells: NDArray[np.intp]


def plan_slide(slide: Slide, res: int, mpp: float | None) -> GridPlan:
    """Return which patches of `slide` are to be looked at: all that tissue reaches into.

    Raises DataError if the slide cannot be read or its microns per pixel are not known.
    """
    info = slide_info(slide.path)
    l0_side = res * patch_scale(slide, info, mpp)
    grid = plan_grid(info, l0_side)
    longest_px = max(info.width_px, info.height_px)
    tissue_px = math.ceil(longest_px / l0_side * _TISSUE_PX_PER_PATCH)
    tissue, frame = find_tissue(slide.path, min(tissue_px, _TISSUE_PX_MAX, longest_px))
    return GridPlan(grid, np.argwhere(grid.cells(tissue, frame)))


class GridDataset(_PatchSource):
    """The planned cells of every slide, slide after slide; a sample's label is its slide's.

    `labels` says which number each label of the manifest stands for.
    """

    def __init__(
        self,
        slides: Sequence[Slide],
        plans: Sequence[GridPlan],
        labels: Mapping[str, int],
        res: int,
        *,
        mpp: float | None = None,
    ) -> None:
        super().__init__(slides, labels, res, mpp=mpp)
        self.plans = plans
        self.ends = list(accumulate(len(plan.cells) for plan in plans))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def record(self, position: int) -> Slide:
        """Return the slide that a cell is of."""
        return self.records[self.place(position)[0]]

    def place(self, position: int) -> tuple[int, int, int]:
        """Return which slide a sample is of, and the row and column of its cell."""
        at = bisect_right(self.ends, position)
        row, column = self.plans[at].cells[position - self.ends[at]]
        return at, int(row), int(column)

    def __getitem__(self, key: SampleKey) -> SlideSample:
        """Read one cell; DataError if the slide cannot be read."""
        at, row, column = self.place(key.position)
        slide = self.records[at]
        pixels = self._readers.get(slide).read(*self.plans[at].grid.corner(row, column))
        return self._sample(slide, pixels, self._labels[slide.label], key.position)
