"""The engine's view of a network: maps, expressions between them, segments that make maps.

A map is a feature map that is held as a whole. A segment makes one: strip by strip it evaluates
an expression of maps (what is cheap: normalise, rectify, add, concatenate) and passes it through
one operation (what is not: a convolution, a pooling). Values that are not maps exist as strips
alone, and again in backward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from umtrain.streaming.operations import Operation
from umtrain.streaming.rows import Strip, cut_rows
from umtrain.streaming.volumes import Plane


@dataclass
class Map:
    """A feature map (N, C, H, W) that is held as a whole, or a band of rows of one.

    That of a volume, (N, C, D, H, W), has its slices as rows: it is held as (N, C, D, H·W), and
    `plane` is (H, W). See umtrain/streaming/volumes.py.
    """

    index: int
    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    plane: Plane = None
    # Where others make some of its rows (see bands.py): those that are made here.
    own: tuple[int, int] | None = None

    def strips(self, rows_per_strip: int) -> list[Strip]:
        """Return the strips in which it is made."""
        n_images, _, n_rows, _ = self.shape
        return cut_rows(n_images, n_rows, self.own, rows_per_strip)

    def with_rows(self, n_rows: int, n_images: int | None = None) -> "Map":
        """Return a map of another height, and of `n_images` images if they are given."""
        images, channels, _, columns = self.shape
        return replace(self, shape=(n_images or images, channels, n_rows, columns))

    @property
    def outer_shape(self) -> tuple[int, ...]:
        """Return the shape that it has outside of the engine."""
        return self.shape if self.plane is None else (*self.shape[:3], *self.plane)

    @property
    def n_bytes(self) -> int:
        """Return its size in memory."""
        n_images, channels, rows, columns = self.shape
        return n_images * channels * rows * columns * self.dtype.itemsize

    def empty(self, device: torch.device) -> Tensor:
        """Return a tensor for its content, channels-last, not filled."""
        return torch.empty(
            self.shape, dtype=self.dtype, device=device, memory_format=torch.channels_last
        )

    @property
    def row_bytes(self) -> int:
        """Return the size of one row of one image."""
        return self.shape[1] * self.shape[3] * self.dtype.itemsize


@dataclass(frozen=True)
class Norm:
    """A normalisation of the map `map`: y to scale·y + shift, per channel (and image).

    `domain` is what its statistics are over: "batch", "group" (of channels, one image), "image"
    (one channel, one image), or "fixed" for statistics that are given.
    """

    index: int
    map: int
    module: nn.Module
    domain: str
    groups: int
    eps: float
    is_updating: bool


@dataclass(frozen=True)
class Term:
    """A map, as it is or normalised."""

    map: int
    norm: int | None = None


@dataclass(frozen=True)
class Blend:
    """The sum of one or two terms of different maps, rectified or not."""

    terms: tuple[Term, ...]
    relu: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Concat:
    """Expressions beside each other along the channels."""

    parts: "tuple[Expression, ...]"
    dtype: torch.dtype


@dataclass(frozen=True)
class Masked:
    """Dropout: an expression times a mask of 0 and 1 that is held as a map, times `scale`."""

    part: "Expression"
    mask: int
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of its strips."""
        return self.part.dtype


@dataclass(frozen=True)
class Pointwise:
    """Any function that works pixel by pixel, of expressions."""

    name: str
    function: Callable[..., Tensor]
    parts: "tuple[Expression, ...]"
    dtype: torch.dtype


Expression = Blend | Concat | Masked | Pointwise


def terms_of(expression: Expression) -> Iterator[Term]:
    """Yield every use of a map in an expression; masks are none."""
    if isinstance(expression, Blend):
        yield from expression.terms
    elif isinstance(expression, Masked):
        yield from terms_of(expression.part)
    else:
        for part in expression.parts:
            yield from terms_of(part)


def masks_of(expression: Expression) -> Iterator[int]:
    """Yield the dropout masks of an expression."""
    if isinstance(expression, Masked):
        yield expression.mask
        yield from masks_of(expression.part)
    elif isinstance(expression, Concat | Pointwise):
        for part in expression.parts:
            yield from masks_of(part)


@dataclass
class Segment:
    """Makes the map `out` (or the vectors `pooled`) from an expression and an operation."""

    index: int
    name: str
    source: Expression
    source_shape: tuple[int, int, int, int]
    source_dtype: torch.dtype
    operation: Operation | None
    out: int | None
    pooled: int | None = None
    module: nn.Module | None = None
    flops: float = 0.0
    # Where its sources are bands: the rows of them that it reads.
    reads: tuple[int, int] | None = None

    @property
    def read_rows(self) -> tuple[int, int]:
        """Return the rows of its sources that it reads."""
        return (0, self.source_shape[2]) if self.reads is None else self.reads

    def source_strips(self, rows_per_strip: int) -> list[Strip]:
        """Return the strips of what it reads, where it reads each row once."""
        n_images, _, n_rows, _ = self.source_shape
        return cut_rows(n_images, n_rows, self.reads, rows_per_strip)

    @property
    def sources(self) -> list[int]:
        """Return the maps that it reads, each once, masks not among them."""
        return list(dict.fromkeys(term.map for term in terms_of(self.source)))


@dataclass(frozen=True)
class Mask:
    """A dropout mask over a map-shaped value, drawn in forward, before `segment` runs."""

    map: int
    keep: float
    segment: int


@dataclass
class Program:
    """A network, or the part of one, that can be streamed."""

    maps: list[Map] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)
    pooled: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)

    @property
    def output_planes(self) -> list[Plane]:
        """Return for each output the plane that its map has; None for vectors."""
        return [self.maps[index].plane if kind == "map" else None for kind, index in self.outputs]

    def norms_of(self, index: int) -> list[Norm]:
        """Return the normalisations of a map."""
        return [norm for norm in self.norms if norm.map == index]

    @cached_property
    def gradient_norms(self) -> list[int | None]:
        """For each map the normalisation whose output its gradient is stored for, if there is one.

        A map that is read through one normalisation only keeps the gradient of what comes out of
        it; what the normalisation makes of that is applied when the producer reads it.
        """
        uses: list[set[int | None]] = [set() for _ in self.maps]
        for segment in self.segments:
            for term in terms_of(segment.source):
                uses[term.map].add(term.norm)
        for kind, index in self.outputs:
            if kind == "map":
                uses[index].add(None)
        return [use.pop() if len(use) == 1 else None for use in uses]

    def producer(self, index: int) -> int | None:
        """Return the segment that makes a map; None for inputs and masks."""
        return next((s.index for s in self.segments if s.out == index), None)

    def consumers(self, index: int) -> list[int]:
        """Return the segments that read a map, in order."""
        return [s.index for s in self.segments if index in s.sources]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of its operations and normalisations, each once."""
        modules: list[Any] = [s.module for s in self.segments] + [n.module for n in self.norms]
        found: dict[int, nn.Parameter] = {}
        for module in modules:
            for parameter in () if module is None else module.parameters(recurse=False):
                found[id(parameter)] = parameter
        return list(found.values())
