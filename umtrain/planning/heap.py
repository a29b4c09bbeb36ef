"""glibc's heap, simulated: how far it grows over a step's buffers, and what it then holds.

With `FreedBuffers.RECYCLE` large buffers come from one heap that never gives anything back, so
the resident set is all that was ever touched: what is alive, and the holes between. The heap takes
the smallest hole that fits and joins free neighbours (Lea, "A memory allocator", 1996; best fit).

# Note: [Fragments between buffers]
# torch asks for aligned memory, so between two buffers that are fresh from the heap's end glibc
# leaves a fragment of some 48 bytes, which small objects take: such neighbours never join. A
# freed buffer's place takes the next one of its size, but where a fragment at its end is needed to
# align in and is taken. That is chance, drawn here from a seed. The share was fitted to peaks of
# ResNet-50, ResNet-101 and ResUNet35, 256 to 2048 pixels, in fp32 (scripts/bench_plan.py measured):
# the same step, run again, differs by up to 15%.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from random import Random

ALIGNMENT_BYTES = 64
_ROOM_TO_ALIGN_BYTES = 2 * ALIGNMENT_BYTES
SHARE_SPOILED = 0.1


@dataclass(frozen=True)
class Event:
    """Buffer `buffer` is taken (n_bytes more than 0) or freed (0)."""

    buffer: int
    n_bytes: int = 0


class Heap:
    """Best fit with coalescing; what is larger than `mapped_from_bytes` is a mapping of its own."""

    def __init__(
        self, mapped_from_bytes: int, share_spoiled: float = SHARE_SPOILED, seed: int = 0
    ) -> None:
        self._random, self._share_spoiled = Random(seed), share_spoiled
        self._mapped_from_bytes = mapped_from_bytes
        self._by_size: list[tuple[int, int]] = []  # (size, offset) of holes
        self._end_of: dict[int, int] = {}  # offset of a hole: its end
        self._start_of: dict[int, int] = {}  # end of a hole: its offset
        self.places: dict[int, tuple[int, int]] = {}
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
        is_spoiled = self._random.random() < self._share_spoiled
        hole_bytes = size_bytes + (_ROOM_TO_ALIGN_BYTES if is_spoiled else 0)
        position = bisect_left(self._by_size, (hole_bytes, 0))
        if position < len(self._by_size):
            _, offset = self._by_size[position]
            end = self._remove(offset)
            if end > offset + size_bytes:
                self._add(offset + size_bytes, end)
        else:
            offset = self.end_bytes
            self.end_bytes += size_bytes + ALIGNMENT_BYTES
        self.places[buffer] = offset, offset + size_bytes

    def _free(self, buffer: int) -> None:
        if buffer in self._mapped:
            self._mapped_bytes -= self._mapped.pop(buffer)
            return
        start, end = self.places.pop(buffer)
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
