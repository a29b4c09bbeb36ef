"""glibc's heap, simulated: how far it grows over a step's buffers, and what it then holds.

With `FreedBuffers.RECYCLE` large buffers come from one heap that never gives anything back, so
the resident set is all that was ever touched: what is alive, and the holes between. The heap takes
the smallest hole that fits and joins free neighbours (Lea, "A memory allocator", 1996; best fit).

# Note: [Why a hole does not take its own size again]
# torch asks for aligned memory; glibc looks for a hole with room to align in, and what it cuts off
# becomes a fragment that small objects take. So a freed buffer's place is too small for the next
# buffer of just its size, unless a neighbour is free too.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 64
_OVERHEAD_BYTES = 2 * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Event:
    """Buffer `buffer` is taken (n_bytes more than 0) or freed (0)."""

    buffer: int
    n_bytes: int = 0


class Heap:
    """Best fit with coalescing; what is larger than `mapped_from_bytes` is a mapping of its own."""

    def __init__(self, mapped_from_bytes: int) -> None:
        self._mapped_from_bytes = mapped_from_bytes
        self._by_size: list[tuple[int, int]] = []  # (size, offset) of holes
        self._end_of: dict[int, int] = {}  # offset of a hole: its end
        self._start_of: dict[int, int] = {}  # end of a hole: its offset
        self._taken: dict[int, tuple[int, int]] = {}
        self._mapped: dict[int, int] = {}
        self._mapped_bytes = 0
        self.end_bytes = 0
        self.peak_bytes = 0

    def apply(self, event: Event) -> None:
        """Take or free a buffer."""
        if event.n_bytes:
            self._take(event.buffer, event.n_bytes)
        else:
            self._free(event.buffer)
        self.peak_bytes = max(self.peak_bytes, self.end_bytes + self._mapped_bytes)

    def _take(self, buffer: int, n_bytes: int) -> None:
        if n_bytes >= self._mapped_from_bytes:
            self._mapped[buffer] = n_bytes
            self._mapped_bytes += n_bytes
            return
        size_bytes = -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        position = bisect_left(self._by_size, (size_bytes + _OVERHEAD_BYTES, 0))
        if position < len(self._by_size):
            _, offset = self._by_size[position]
            end = self._remove(offset)
            if end > offset + size_bytes:
                self._add(offset + size_bytes, end)
        else:
            offset = self._extend(size_bytes)
        self._taken[buffer] = offset, offset + size_bytes

    def _extend(self, size_bytes: int) -> int:
        """Make room at the end, with the hole that touches it."""
        offset = self._start_of.get(self.end_bytes, self.end_bytes)
        if offset != self.end_bytes:
            self._remove(offset)
        self.end_bytes = max(self.end_bytes, offset + size_bytes + ALIGNMENT_BYTES)
        return offset

    def _free(self, buffer: int) -> None:
        if buffer in self._mapped:
            self._mapped_bytes -= self._mapped.pop(buffer)
            return
        start, end = self._taken.pop(buffer)
        if end in self._end_of:
            end = self._remove(end)
        if start in self._start_of:
            before = self._start_of[start]
            self._remove(before)
            start = before
        self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        insort(self._by_size, (end - start, start))
        self._end_of[start], self._start_of[end] = end, start

    def _remove(self, start: int) -> int:
        end = self._end_of.pop(start)
        del self._start_of[end]
        del self._by_size[bisect_left(self._by_size, (end - start, start))]
        return end


def recycled_peak_bytes(steps: Sequence[Iterable[Event]], mapped_from_bytes: int) -> int:
    """Return the heap's peak over steps one after another: holes of one are there in the next."""
    heap = Heap(mapped_from_bytes)
    for step in steps:
        for event in step:
            heap.apply(event)
    return heap.peak_bytes


def live_peak_bytes(events: Iterable[Event]) -> int:
    """Return the peak where every buffer is a mapping of its own, gone when freed."""
    sizes: dict[int, int] = {}
    total = peak = 0
    for event in events:
        if event.n_bytes:
            sizes[event.buffer] = event.n_bytes
            total += event.n_bytes
            peak = max(peak, total)
        else:
            total -= sizes.pop(event.buffer)
    return peak
