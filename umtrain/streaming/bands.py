"""One image over several ranks: each makes and holds a band of rows of every feature map.

How maps are cut is in cutting.py. Margins come over when a map is made; their gradients go back, to
be added to those of the rank that made the rows, before its backward reads them.

# Note: [What is whole, and what is a part]
# Values outside of the bands (what global pooling gives, outputs, what is not streamed) are whole
# and the same on every rank. Gradients, of whole values and of parameters, are parts: the sum over
# the ranks counts. So where a whole value is made of bands, its parts are added up going back;
# where bands are cut from a whole value, each rank hands back its part. Every rank's loss counts
# 1/n of the whole one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from umtrain.errors import ConfigError
from umtrain.exchange import Exchange, Rows, given_rows
from umtrain.streaming.cutting import Cut, Range, Transfer, own_rows
from umtrain.streaming.program import Map, Program
from umtrain.streaming.rows import Strip
from umtrain.streaming.storage import Cursor, Place


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
        self._cut = Cut(whole, self._n_ranks)
        self._check_inputs()
        self.program, self.largest = self._cut.program_of(self._rank), self._cut.largest()
        self._transfers = {m.index: list(self._cut.transfers_of(m)) for m in whole.maps}

    def _check(self) -> None:
        lowest = min(self._whole.maps, key=lambda a_map: a_map.shape[2])
        if lowest.shape[2] < self._n_ranks:
            raise ConfigError(
                f"parallel=spatial: the feature map {lowest.name} has {lowest.shape[2]} rows, too "
                f"few for {self._n_ranks} processes; raise res, or start fewer processes"
            )

    def _check_inputs(self) -> None:
        for rank in range(self._n_ranks):
            for index in self._given_bands:
                rows, given = self._cut.held_rows(index, rank), self._given(index, rank)
                if given.met(rows) != rows:
                    raise ConfigError(
                        f"parallel=spatial: process {rank} reads rows {rows.first} to {rows.last} "
                        f"of the image and is given {given.first} to {given.last}: the network's "
                        "first layer reaches too far. Use parallel=data"
                    )

    def _given(self, index: int, rank: int) -> Range:
        n_rows = self._whole.maps[index].shape[2]
        return Range(*given_rows(n_rows, rank, self._n_ranks))

    def _held(self, index: int) -> Range:
        return self._cut.held_rows(index, self._rank)

    # Rows that others make --------------------------------------------------------------------

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
        first, last = transfer.rows.seen_from(self._held(index).first)
        n_images = self._whole.maps[index].shape[0]
        return [Strip(image, image + 1, first, last) for image in range(n_images)]

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
            a_map.with_rows(t.rows.last - t.rows.first, n_images=1).empty(self._exchange.device)
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
        rows = self._held(index)
        return whole[:, :, rows.first : rows.last]

    def band_of_input(self, index: int, given: Tensor) -> Tensor:
        """Return the rows of an input that this rank holds, a view."""
        if index not in self._given_bands:
            return self.band_of(index, given)
        first, last = self._held(index).seen_from(self._given(index, self._rank).first)
        return given[:, :, first:last]

    def whole_of(self, index: int, band: Tensor) -> Tensor:
        """Return a whole map, from every rank's own rows of it."""
        a_map, first = self._whole.maps[index], self._held(index).first
        whole = a_map.empty(band.device)
        ranges = [own_rows(a_map.shape[2], rank, self._n_ranks) for rank in range(self._n_ranks)]
        start, stop = ranges[self._rank].seen_from(first)
        own = band[:, :, start:stop].clone(memory_format=torch.channels_last)
        others = [rank for rank in range(self._n_ranks) if rank != self._rank]
        incoming = []
        for rank in others:
            room = a_map.with_rows(ranges[rank].last - ranges[rank].first)
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
            given = self._given(index, self._rank)
            shape[2] = given.last - given.first
        part = band.new_zeros(shape).contiguous(memory_format=torch.channels_last)
        self.band_of_input(index, part).copy_(band)
        return part

    def whole_map(self, index: int) -> Map:
        """Return a map as a whole."""
        return self._whole.maps[index]

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
