"""One image over several ranks: each makes and holds a band of rows of every feature map.

Maps of H rows are cut at H·r/n. A rank makes its own rows of each map. Of the maps that its
segments read it holds a few more, the **margins**, which other ranks make: they come over when the
map is made, and their gradients go back, to be added to those of the rank that made them, before
its backward reads them. So a segment sees an ordinary, smaller map, whose first row has another
number; only its windows know where the whole map ends.

# Note: [What is whole, and what is a part]
# Values outside of the bands (what global pooling gives, outputs, what is not streamed) are whole
# and the same on every rank. Gradients, of whole values and of parameters, are parts: the sum over
# the ranks counts. So where a whole value is made of bands, its parts are added up going back;
# where bands are cut from a whole value, each rank hands back its part. Every rank's loss counts
# 1/n of the whole one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from umtrain.errors import ConfigError
from umtrain.exchange import Exchange, Rows, given_rows
from umtrain.streaming.operations import GlobalPooling
from umtrain.streaming.program import Map, Program, Segment
from umtrain.streaming.rows import Strip, clipped
from umtrain.streaming.storage import Cursor, Place


class Range(NamedTuple):
    """Rows [first, last) of a whole map."""

    first: int
    last: int

    def joined(self, other: "Range") -> "Range":
        """Return the smallest range that has both."""
        return Range(min(self.first, other.first), max(self.last, other.last))

    def met(self, other: "Range") -> "Range":
        """Return what both have; an empty range if that is nothing."""
        first = max(self.first, other.first)
        return Range(first, max(first, min(self.last, other.last)))

    def seen_from(self, first: int) -> tuple[int, int]:
        """Return the rows as they are numbered where row `first` is number 0."""
        return self.first - first, self.last - first


class Transfer(NamedTuple):
    """Rows of a map that rank `maker` makes and rank `holder` has in its margins."""

    maker: int
    holder: int
    rows: Range


def own_rows(n_rows: int, rank: int, n_ranks: int) -> Range:
    """Return the rows of a map that a rank makes."""
    return Range(n_rows * rank // n_ranks, n_rows * (rank + 1) // n_ranks)


class Bands:
    """A program cut into bands: `program` is this rank's, `largest` has the largest of all maps.

    The plan is made for `largest`, so that all ranks make the same maps again at the same time.
    Of the inputs that `given_bands` marks every rank is given `given_rows` only, of others all.
    Raises ConfigError for a map that has fewer rows than there are ranks, and for inputs of which
    more rows are read than are given.
    """

    def __init__(self, whole: Program, exchange: Exchange, given_bands: Sequence[bool]) -> None:
        self._whole, self._exchange = whole, exchange
        pairs = zip(whole.inputs, given_bands, strict=True)
        self._given_bands = {index for index, is_band in pairs if is_band}
        self._rank, self._n_ranks = exchange.rank, exchange.n_ranks
        self._check()
        self._held = [_held_rows(whole, rank, self._n_ranks) for rank in range(self._n_ranks)]
        self.program = self._cut(self._rank)
        heights = [max(rows.last - rows.first for rows in self._held_of(m)) for m in whole.maps]
        self.largest = replace(
            self.program,
            maps=[
                replace(m, shape=(*m.shape[:2], height, m.shape[3]))
                for m, height in zip(self.program.maps, heights, strict=True)
            ],
        )
        self._transfers = {m.index: list(self._transfers_of(m)) for m in whole.maps}
        self._check_inputs()

    def _check(self) -> None:
        lowest = min(self._whole.maps, key=lambda a_map: a_map.shape[2])
        if lowest.shape[2] < self._n_ranks:
            raise ConfigError(
                f"parallel=spatial: the feature map {lowest.name} has {lowest.shape[2]} rows, too "
                f"few for {self._n_ranks} processes; raise res, or start fewer processes"
            )

    def _check_inputs(self) -> None:
        for index in self._given_bands:
            rows, given = self._held_here(index), Range(*self._given(index))
            if given.met(rows) != rows:
                raise ConfigError(
                    f"parallel=spatial: the network reads rows {rows.first} to {rows.last} of its "
                    f"input in process {self._rank}, which has {given.first} to {given.last} of "
                    "them; its first layer reaches too far. Use parallel=data"
                )

    def _given(self, index: int) -> tuple[int, int]:
        return given_rows(self._whole.maps[index].shape[2], self._exchange)

    def _held_here(self, index: int) -> Range:
        return self._held[self._rank][self._whole.maps[index].shape[2]]

    def _held_of(self, a_map: Map) -> list[Range]:
        return [held[a_map.shape[2]] for held in self._held]

    # This rank's program ----------------------------------------------------------------------

    def _cut(self, rank: int) -> Program:
        held = self._held[rank]
        maps = []
        for a_map in self._whole.maps:
            n_images, channels, n_rows, columns = a_map.shape
            rows = held[n_rows]
            own = own_rows(n_rows, rank, self._n_ranks).seen_from(rows.first)
            shape = (n_images, channels, rows.last - rows.first, columns)
            maps.append(replace(a_map, shape=shape, own=own))
        segments = [self._cut_segment(segment, rank) for segment in self._whole.segments]
        return replace(self._whole, maps=maps, segments=segments)

    def _cut_segment(self, segment: Segment, rank: int) -> Segment:
        held = self._held[rank]
        n_images, channels, n_rows, columns = segment.source_shape
        rows = held[n_rows]
        reads = _read_rows(self._whole, segment, rank, self._n_ranks)
        operation = segment.operation
        if operation is not None and segment.out is not None:
            out_first = held[self._whole.maps[segment.out].shape[2]].first
            operation = operation.moved(out_first, rows.first)
        return replace(
            segment,
            source_shape=(n_images, channels, rows.last - rows.first, columns),
            operation=operation,
            reads=reads.seen_from(rows.first),
        )

    # Rows that others make --------------------------------------------------------------------

    def _transfers_of(self, a_map: Map) -> Iterator[Transfer]:
        """Yield what ranks need of each other's rows of a map."""
        n_rows = a_map.shape[2]
        readers = [self._whole.segments[reader] for reader in self._whole.consumers(a_map.index)]
        for holder in range(self._n_ranks):
            needed = [_read_rows(self._whole, s, holder, self._n_ranks) for s in readers]
            for maker in range(self._n_ranks):
                made = own_rows(n_rows, maker, self._n_ranks)
                for rows in _united([made.met(rows) for rows in needed]):
                    if maker != holder:
                        yield Transfer(maker, holder, rows)

    def fill(self, index: int, place: Place) -> None:
        """Fill the margins of a map, of which all ranks have made their own rows."""
        transfers = self._transfers[index]
        outgoing = self._read(index, place, [t for t in transfers if t.maker == self._rank])
        coming = [t for t in transfers if t.holder == self._rank]
        incoming = self._rooms(index, coming, [t.maker for t in coming])
        holders = [t.holder for t in transfers if t.maker == self._rank]
        self._exchange.swap(self._addressed(index, outgoing, holders), incoming)
        self._write(index, place, coming, [rows.content for rows in incoming], adds=False)

    def collect(self, index: int, place: Place) -> None:
        """Give the gradients of a map's margins to those who made them, and add theirs of ours."""
        transfers = self._transfers[index]
        leaving = [t for t in transfers if t.holder == self._rank]
        outgoing = self._read(index, place, leaving)
        coming = [t for t in transfers if t.maker == self._rank]
        incoming = self._rooms(index, coming, [t.holder for t in coming])
        makers = [t.maker for t in leaving]
        self._exchange.swap(self._addressed(index, outgoing, makers), incoming)
        self._write(index, place, coming, [rows.content for rows in incoming], adds=True)

    def _strips(self, index: int, transfer: Transfer) -> list[Strip]:
        first, last = transfer.rows.seen_from(self._first(index))
        n_images = self._whole.maps[index].shape[0]
        return [Strip(image, image + 1, first, last) for image in range(n_images)]

    def _first(self, index: int) -> int:
        return self._held_here(index).first

    def _read(self, index: int, place: Place, transfers: Sequence[Transfer]) -> list[Tensor]:
        found = []
        for transfer in transfers:
            strips = self._strips(index, transfer)
            cursor = place.cursor(strips, reads=True, writes=False)
            rows = (cursor.get(i) for i in range(len(strips)))
            found += [content.clone(memory_format=torch.channels_last) for content in rows]
            cursor.finish()
        return found

    def _addressed(self, index: int, contents: list[Tensor], ranks: list[int]) -> list[Rows]:
        n_images = self._whole.maps[index].shape[0]
        to = [rank for rank in ranks for _ in range(n_images)]
        return [Rows(rank, content) for rank, content in zip(to, contents, strict=True)]

    def _rooms(self, index: int, transfers: Sequence[Transfer], ranks: list[int]) -> list[Rows]:
        a_map = self._whole.maps[index]
        rooms = [
            replace(
                a_map, shape=(1, a_map.shape[1], t.rows.last - t.rows.first, a_map.shape[3])
            ).empty(self._exchange.device)
            for t in transfers
            for _ in range(a_map.shape[0])
        ]
        return self._addressed(index, rooms, ranks)

    def _write(
        self,
        index: int,
        place: Place,
        transfers: Sequence[Transfer],
        contents: Sequence[Tensor],
        adds: bool,
    ) -> None:
        """Write rows, or add them to what is there; rows of two transfers may be the same."""
        given = iter(contents)
        for transfer in transfers:
            strips = self._strips(index, transfer)
            cursor = place.cursor(strips, reads=adds, writes=True)
            for i in range(len(strips)):
                room = cursor.get(i)
                content = next(given)
                if adds:
                    room.add_(content)
                else:
                    room.copy_(content)
                cursor.commit(i)
            cursor.finish()

    # Between whole values and bands: see Note: [What is whole, and what is a part] --------------

    def band_of(self, index: int, whole: Tensor) -> Tensor:
        """Return the rows of a whole map that this rank holds, a view."""
        rows = self._held_here(index)
        return whole[:, :, rows.first : rows.last]

    def band_of_input(self, index: int, given: Tensor) -> Tensor:
        """Return the rows of an input that this rank holds, a view."""
        if index not in self._given_bands:
            return self.band_of(index, given)
        first, last = self._held_here(index).seen_from(self._given(index)[0])
        return given[:, :, first:last]

    def whole_of(self, index: int, band: Tensor) -> Tensor:
        """Return a whole map, from every rank's own rows of it."""
        a_map, first = self._whole.maps[index], self._first(index)
        whole = a_map.empty(band.device)
        ranges = [own_rows(a_map.shape[2], rank, self._n_ranks) for rank in range(self._n_ranks)]
        start, stop = ranges[self._rank].seen_from(first)
        own = band[:, :, start:stop].clone(memory_format=torch.channels_last)
        others = [rank for rank in range(self._n_ranks) if rank != self._rank]
        incoming = []
        for rank in others:
            height = ranges[rank].last - ranges[rank].first
            room = replace(a_map, shape=(*a_map.shape[:2], height, a_map.shape[3]))
            incoming.append(Rows(rank, room.empty(band.device)))
        self._exchange.swap([Rows(rank, own) for rank in others], incoming)
        for rank, content in [(self._rank, own), *incoming]:
            whole[:, :, ranges[rank].first : ranges[rank].last] = content
        return whole

    def gradient_of_whole(self, given: Tensor) -> Tensor:
        """Return the gradient of a whole value that was made of bands, from every rank's part."""
        return self._exchange.total(given)

    def part_of_gradient(self, index: int, band: Tensor) -> Tensor:
        """Return this rank's part of the gradient of an input, given that of the band of it."""
        shape = list(self._whole.maps[index].shape)
        if index in self._given_bands:
            first, last = self._given(index)
            shape[2] = last - first
        part = band.new_zeros(shape).contiguous(memory_format=torch.channels_last)
        self.band_of_input(index, part).copy_(band)
        return part

    def whole_shape(self, index: int) -> tuple[int, int, int, int]:
        """Return the shape of a map as a whole."""
        return self._whole.maps[index].shape

    def pool(self, kind: str, value: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return what global pooling gives of all ranks' rows, and the strips of maxima here.

        `value` is the sum or maximum of this rank's rows, `chosen` the strip that holds it; -1
        where another rank holds it, the first one of several.
        """
        if kind == "avg":
            return self._exchange.total(value), chosen
        found = self._exchange.gather(value)
        rank = found.argmax(0, keepdim=True)  # of equal values the first
        return found.gather(0, rank)[0], chosen.masked_fill(rank[0] != self._rank, -1)

    def clear_unwritten(self, place: Place, a_map: Map, first: int, last: int) -> None:
        """Zero the rows of a new gradient outside of [first, last), which nothing else writes."""
        for start, stop in ((0, first), (last, a_map.shape[2])):
            if stop > start:
                strips = [Strip(i, i + 1, start, stop) for i in range(a_map.shape[0])]
                _zero(place.cursor(strips, reads=False, writes=True), len(strips))


def _zero(cursor: Cursor, n: int) -> None:
    for i in range(n):
        cursor.get(i).zero_()
        cursor.commit(i)
    cursor.finish()


def _read_rows(program: Program, segment: Segment, rank: int, n_ranks: int) -> Range:
    """Return the rows of its source maps that a rank's part of a segment reads."""
    n_rows = segment.source_shape[2]
    operation = segment.operation
    if operation is None or segment.out is None or isinstance(operation, GlobalPooling):
        return own_rows(n_rows, rank, n_ranks)
    own = own_rows(program.maps[segment.out].shape[2], rank, n_ranks)
    return Range(*clipped(*operation.input_rows(*own), n_rows))


def _held_rows(program: Program, rank: int, n_ranks: int) -> dict[int, Range]:
    """Return the rows that a rank holds of maps of each height: its own, and all that it reads.

    Maps of one height are held alike, so that an expression finds the same rows of all of them.
    """
    heights = {a_map.shape[2] for a_map in program.maps}
    held = {n_rows: own_rows(n_rows, rank, n_ranks) for n_rows in heights}
    for segment in program.segments:
        n_rows = segment.source_shape[2]
        held[n_rows] = held[n_rows].joined(_read_rows(program, segment, rank, n_ranks))
    return held


def _united(ranges: Sequence[Range]) -> list[Range]:
    """Return the rows that any of `ranges` has, in order, each once."""
    united: list[Range] = []
    for rows in sorted(r for r in ranges if r.last > r.first):
        if united and rows.first <= united[-1].last:
            united[-1] = united[-1].joined(rows)
        else:
            united.append(rows)
    return united
