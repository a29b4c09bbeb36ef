"""Which rows: of an operation's input for rows of its output, and of a map for each strip.

Rows are half-open ranges. Input rows may lie outside the map, where they stand for padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple


class Strip(NamedTuple):
    """Rows [first, last) of the images [image, image_end) of a map."""

    image: int
    image_end: int
    first: int
    last: int

    @property
    def n_rows(self) -> int:
        """Return the height of the strip."""
        return self.last - self.first

    def with_rows(self, first: int, last: int) -> "Strip":
        """Return other rows of the same images."""
        return Strip(self.image, self.image_end, first, last)


@dataclass(frozen=True)
class Window:
    """How a sliding window (convolution, pooling) runs over the rows of its input."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """Return the rows that output rows [first, last) read, padding included."""
        reach = self.dilation * (self.kernel - 1) + 1
        return first * self.stride - self.padding, (last - 1) * self.stride - self.padding + reach

    def moved(self, out_first: int, in_first: int) -> "Window":
        """Return the window where rows `out_first` and `in_first` are the first of their maps."""
        return replace(self, padding=self.padding - out_first * self.stride + in_first)


@dataclass(frozen=True)
class Enlargement:
    """Upsampling by a whole factor whose output rows read up to `halo` rows beyond their own.

    Its input has `n_rows`; rows are numbered from `out_first` and `in_first`.
    """

    factor: int
    halo: int
    n_rows: int
    out_first: int = 0
    in_first: int = 0

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """Return the rows that output rows [first, last) read; never outside of the map."""
        start = (first + self.out_first) // self.factor - self.halo
        stop = -(-(last + self.out_first) // self.factor) + self.halo
        return max(0, start) - self.in_first, min(self.n_rows, stop) - self.in_first

    def n_skipped(self, first: int, last: int) -> int:
        """Return how many rows of what those input rows give lie before output row `first`."""
        start = self.input_rows(first, last)[0] + self.in_first
        return first + self.out_first - start * self.factor

    def moved(self, out_first: int, in_first: int) -> "Enlargement":
        """Return the same where rows `out_first` and `in_first` are the first of their maps."""
        return replace(self, out_first=out_first, in_first=in_first)


def clipped(first: int, last: int, end: int, start: int = 0) -> tuple[int, int]:
    """Return what of a range lies in [start, end); where nothing does, an empty one at its edge."""
    first = min(max(start, first), end)
    return first, min(max(first, last), end)


def strips(n_images: int, n_rows: int, rows_per_strip: int) -> Iterator[Strip]:
    """Cut a map into strips of whole rows; small maps go several whole images at a time.

    Heights differ by a row at most: what is compiled or allocated for one serves the others.
    """
    if rows_per_strip < n_rows:
        n_strips = -(-n_rows // rows_per_strip)
        edges = [n_rows * i // n_strips for i in range(n_strips + 1)]
        for image in range(n_images):
            for first, last in pairwise(edges):
                yield Strip(image, image + 1, first, last)
        return
    images = max(1, rows_per_strip // n_rows)
    for image in range(0, n_images, images):
        yield Strip(image, min(n_images, image + images), 0, n_rows)


def cut_rows(
    n_images: int, n_rows: int, rows: tuple[int, int] | None, rows_per_strip: int
) -> list[Strip]:
    """Cut a map into strips, or only `rows` of it: then image by image, as only whole images that
    follow each other are dense."""
    if rows is None:
        return list(strips(n_images, n_rows, rows_per_strip))
    first, last = rows
    height = last - first
    return [
        strip.with_rows(first + strip.first, first + strip.last)
        for strip in strips(n_images, height, min(rows_per_strip, height))
    ]
