"""A program cut into bands of rows: which rows of each map a rank makes, reads and holds.

Maps of H rows are cut at H·r/n. A rank holds its own rows of each map, and those beyond that its
segments read, the **margins**. So its program is an ordinary, smaller one, in which the first row
of a map has another number; only its windows know where the whole map ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from umtrain.streaming.operations import GlobalPooling
from umtrain.streaming.program import Map, Program, Segment
from umtrain.streaming.rows import clipped


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


class Cut:
    """A program cut for `n_ranks`."""

    def __init__(self, whole: Program, n_ranks: int) -> None:
        self.whole, self._n_ranks = whole, n_ranks
        self._held = [_held_rows(whole, rank, n_ranks) for rank in range(n_ranks)]

    def held_rows(self, index: int, rank: int) -> Range:
        """Return the rows that a rank holds of a map."""
        return self._held[rank][self.whole.maps[index].shape[2]]

    def program_of(self, rank: int) -> Program:
        """Return a rank's program."""
        maps = []
        for a_map in self.whole.maps:
            rows = self.held_rows(a_map.index, rank)
            own = own_rows(a_map.shape[2], rank, self._n_ranks).seen_from(rows.first)
            maps.append(replace(a_map.with_rows(rows.last - rows.first), own=own))
        segments = [self._cut_segment(segment, rank) for segment in self.whole.segments]
        return replace(self.whole, maps=maps, segments=segments)

    def largest(self) -> Program:
        """Return a rank's program, but with each map as high as any rank's is."""
        program = self.program_of(0)
        heights = [
            max(rows.last - rows.first for rows in self._held_by_all(a_map))
            for a_map in self.whole.maps
        ]
        pairs = zip(program.maps, heights, strict=True)
        return replace(program, maps=[a_map.with_rows(height) for a_map, height in pairs])

    def _held_by_all(self, a_map: Map) -> list[Range]:
        return [held[a_map.shape[2]] for held in self._held]

    def _cut_segment(self, segment: Segment, rank: int) -> Segment:
        held = self._held[rank]
        n_images, channels, n_rows, columns = segment.source_shape
        rows = held[n_rows]
        reads = _read_rows(self.whole, segment, rank, self._n_ranks)
        operation = segment.operation
        if operation is not None and segment.out is not None:
            out_first = held[self.whole.maps[segment.out].shape[2]].first
            operation = operation.moved(out_first, rows.first)
        return replace(
            segment,
            source_shape=(n_images, channels, rows.last - rows.first, columns),
            operation=operation,
            reads=reads.seen_from(rows.first),
        )

    def transfers_of(self, a_map: Map) -> Iterator[Transfer]:
        """Yield what ranks need of each other's rows of a map, in the same order everywhere."""
        n_rows = a_map.shape[2]
        readers = [self.whole.segments[reader] for reader in self.whole.consumers(a_map.index)]
        for holder in range(self._n_ranks):
            needed = [_read_rows(self.whole, s, holder, self._n_ranks) for s in readers]
            for maker in range(self._n_ranks):
                made = own_rows(n_rows, maker, self._n_ranks)
                for rows in _united([made.met(rows) for rows in needed]):
                    if maker != holder:
                        yield Transfer(maker, holder, rows)


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
