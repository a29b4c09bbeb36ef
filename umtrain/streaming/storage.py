"""Where maps and gradients lie: in the arena, in a tensor of the caller's, or in host memory.

All are read and written strip by strip, in an order that is known ahead; a cursor runs through
it. For host memory it reads one strip ahead and writes behind, so that both overlap with compute.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from umtrain.streaming.rows import Strip

_ROOMS = 3
# Host memory takes a copy fastest from memory that lies as the copy does, modulo this.
ALIGNMENT_BYTES = 4096
# Maps that come back together do so in turns, at most this many parts each, none too small to pay.
PIECES = 32
_LEAST_PIECE_BYTES = 2**24


class Pending(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Return when whoever computes next may use what was copied; raises what went wrong."""


class HostBlock(Protocol):
    """A range of host memory."""

    def start_write(self, offset_bytes: int, source: Tensor) -> Pending:
        """Begin to copy `source`, dense, to the offset; it must stay unchanged until the end."""

    def start_read(self, offset_bytes: int, target: Tensor) -> Pending:
        """Begin to fill `target`, dense, from the offset."""


class HostMemory(Protocol):
    """The slow tier: a spill file, or pinned memory."""

    def room_bytes(self) -> int:
        """Return how much it can hold."""

    def take(self, n_bytes: int) -> HostBlock:
        """Return a block, free again once nothing refers to it."""


class Cursor(ABC):
    """Runs through the strips of one map in their order."""

    @abstractmethod
    def get(self, i: int) -> Tensor:
        """Return strip i, dense in channels-last order; what is written to it counts at commit."""

    @abstractmethod
    def commit(self, i: int) -> None:
        """Keep what strip i holds now."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for what is under way."""


class Place(ABC):
    """Where a map lies."""

    @abstractmethod
    def cursor(self, strips: Sequence[Strip], reads: bool, writes: bool) -> Cursor:
        """Return a cursor over `strips`, which reads their content, writes it, or both."""


class _ViewCursor(Cursor):
    def __init__(self, content: Tensor, strips: Sequence[Strip], dtype: torch.dtype) -> None:
        self._content, self._strips, self._dtype = content, strips, dtype

    def get(self, i: int) -> Tensor:
        strip = self._strips[i]
        view = self._content[strip.image : strip.image_end, :, strip.first : strip.last]
        if view.dtype == self._dtype and view.is_contiguous(memory_format=torch.channels_last):
            return view
        return view.to(self._dtype).contiguous(memory_format=torch.channels_last)

    def commit(self, i: int) -> None:
        pass

    def finish(self) -> None:
        pass


class TensorPlace(Place):
    """A tensor (N, C, H, W); written to only if it has the map's dtype and is channels-last."""

    def __init__(self, content: Tensor, dtype: torch.dtype | None = None) -> None:
        self._content = content
        self._dtype = dtype or content.dtype

    def cursor(self, strips: Sequence[Strip], reads: bool, writes: bool) -> Cursor:
        """See `Place`."""
        return _ViewCursor(self._content, strips, self._dtype)


def in_arena(room: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> TensorPlace:
    """Return the place of a map in a part of the arena, uint8."""
    return TensorPlace(_as_map(room, shape, dtype))


def _as_map(room: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the map of `shape` that lies, channels-last, at the start of `room`, uint8."""
    n_images, channels, rows, columns = shape
    n_bytes = n_images * channels * rows * columns * dtype.itemsize
    dense = room[:n_bytes].view(dtype).view(n_images, rows, columns, channels)
    return dense.permute(0, 3, 1, 2)


class HostPlace(Place):
    """A map in host memory."""

    def __init__(
        self,
        block: HostBlock,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block, self.shape, self.dtype, self.device = block, shape, dtype, device

    def cursor(self, strips: Sequence[Strip], reads: bool, writes: bool) -> Cursor:
        """See `Place`."""
        return _HostCursor(self, strips, reads, writes)


class _PausingPlace(Place):
    """A map that is in the arena for some of its life, and in a block of host memory meanwhile."""

    def __init__(
        self,
        room: Tensor,
        block: HostBlock,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self.room, self._block, self.layout = room, block, _Rows(shape, dtype)
        self._content = TensorPlace(_as_map(room, shape, dtype))


class CopiedPlace(_PausingPlace):
    """A map in the arena that is copied to host memory as it is made.

    The copies go on behind what is computed next; `settle` before anything else lies in `room`.
    """

    def __init__(self, *where: Any) -> None:
        super().__init__(*where)
        self._pending: list[Pending] = []

    def cursor(self, strips: Sequence[Strip], reads: bool, writes: bool) -> Cursor:
        """See `Place`."""
        view = self._content.cursor(strips, reads, writes)
        return _CopyingCursor(self, view, strips) if writes else view

    def start_copy(self, strip: Strip) -> None:
        """Begin to copy a strip, which is all written."""
        start, stop = self.layout.extent(strip)
        self._pending.append(self._block.start_write(start, self.room[start:stop]))

    def settle(self) -> None:
        """Wait until host memory has all of it."""
        for pending in self._pending:
            pending.wait()
        self._pending.clear()


class _CopyingCursor(Cursor):
    def __init__(self, place: CopiedPlace, view: Cursor, strips: Sequence[Strip]) -> None:
        self._place, self._view, self._strips = place, view, strips

    def get(self, i: int) -> Tensor:
        return self._view.get(i)

    def commit(self, i: int) -> None:
        self._place.start_copy(self._strips[i])

    def finish(self) -> None:
        pass


class FilledPlace(_PausingPlace):
    """A map that comes back from host memory to the arena, in pieces, ahead of its reader."""

    def __init__(self, *where: Any) -> None:
        super().__init__(*where)
        self._pending: deque[tuple[int, Pending]] = deque()

    def start_piece(self, i: int) -> None:
        """Begin to bring piece i back, of PIECES from the first row to the last."""
        piece_bytes = max(_LEAST_PIECE_BYTES, -(-self.layout.n_bytes // PIECES))
        piece_bytes = -(-piece_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        start = i * piece_bytes
        piece = self.room[start : min(start + piece_bytes, self.layout.n_bytes)]
        if start < self.layout.n_bytes:
            self._pending.append((start, self._block.start_read(start, piece)))

    def wait_until(self, end: int) -> None:
        """Wait until all bytes before `end` are back."""
        while self._pending and self._pending[0][0] < end:
            self._pending.popleft()[1].wait()

    def cursor(self, strips: Sequence[Strip], reads: bool, writes: bool) -> Cursor:
        """See `Place`."""
        assert not writes
        return _FilledCursor(self, self._content.cursor(strips, reads, writes), strips)


class _FilledCursor(Cursor):
    def __init__(self, place: FilledPlace, view: Cursor, strips: Sequence[Strip]) -> None:
        self._place, self._view, self._strips = place, view, strips

    def get(self, i: int) -> Tensor:
        self._place.wait_until(self._place.layout.extent(self._strips[i])[1])
        return self._view.get(i)

    def commit(self, i: int) -> None:
        raise AssertionError("a map that comes back is only read")

    def finish(self) -> None:
        self._place.wait_until(self._place.layout.n_bytes)


class _Rows:
    """Where the rows of a map lie in bytes, counted from its start."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        n_images, channels, self._n_rows, columns = shape
        self._row_bytes = channels * columns * dtype.itemsize
        self.n_bytes = n_images * self._n_rows * self._row_bytes

    def extent(self, strip: Strip) -> tuple[int, int]:
        """Return the bytes from the start of a strip's first image's rows to its last's end."""
        start = (strip.image * self._n_rows + strip.first) * self._row_bytes
        stop = ((strip.image_end - 1) * self._n_rows + strip.last) * self._row_bytes
        return start, stop


class _HostCursor(Cursor):
    """Note: [Rooms of a cursor]. Strip i is in room i mod 3: while it is computed on, strip i+1
    is read into the next room and strip i-1 is written from the one before."""

    def __init__(
        self, place: HostPlace, strips: Sequence[Strip], reads: bool, writes: bool
    ) -> None:
        self._place, self._strips, self._reads, self._writes = place, strips, reads, writes
        self._layout = _Rows(place.shape, place.dtype)
        largest = max(self._extent(i)[1] for i in range(len(strips)))
        self._rooms = [
            torch.empty(largest + ALIGNMENT_BYTES, dtype=torch.uint8, device=place.device)
            for _ in range(min(_ROOMS, len(strips)))
        ]
        self._pending: list[Pending | None] = [None] * len(self._rooms)
        self._next_read = 0
        self._read_until(0)

    def get(self, i: int) -> Tensor:
        self._next_read = max(self._next_read, i)  # strips may be left out
        self._read_until(i)
        self._settle(i)
        self._read_until(i + 1)
        strip = self._strips[i]
        _, channels, _, columns = self._place.shape
        shape = (strip.image_end - strip.image, channels, strip.n_rows, columns)
        return _as_map(self._room(i), shape, self._place.dtype)

    def commit(self, i: int) -> None:
        offset, n_bytes = self._extent(i)
        source = self._room(i)[:n_bytes]
        self._pending[i % len(self._rooms)] = self._place.block.start_write(offset, source)

    def finish(self) -> None:
        for i in range(len(self._rooms)):
            self._settle(i)

    def _room(self, i: int) -> Tensor:
        """Return the room of strip i, at an address like the strip's offset in the block."""
        room = self._rooms[i % len(self._rooms)]
        return room[(self._extent(i)[0] - room.data_ptr()) % ALIGNMENT_BYTES :]

    def _settle(self, i: int) -> None:
        position = i % len(self._rooms)
        pending, self._pending[position] = self._pending[position], None
        if pending is not None:
            pending.wait()

    def _read_until(self, last: int) -> None:
        """Begin to read the strips up to `last` that have not been asked for."""
        while self._reads and self._next_read <= min(last, len(self._strips) - 1):
            self._start_read(self._next_read)
            self._next_read += 1

    def _start_read(self, i: int) -> None:
        self._settle(i)
        offset, n_bytes = self._extent(i)
        target = self._room(i)[:n_bytes]
        self._pending[i % len(self._rooms)] = self._place.block.start_read(offset, target)

    def _extent(self, i: int) -> tuple[int, int]:
        """Return where strip i starts in the block, and its size."""
        start, stop = self._layout.extent(self._strips[i])
        return start, stop - start
