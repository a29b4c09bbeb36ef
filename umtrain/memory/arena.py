"""Where saved tensors go in the spill file: offsets, first fit, lowest first.

A training step saves the same sizes in the same order every time and frees all of them, so first
fit from the lowest offset gives every tensor the offset it had in the step before: pages that
are mapped already are used again. Storage allocation by first fit: Knuth, TAOCP vol. 1, 2.5.
"""

from bisect import bisect_left, insort


class Arena:
    """Hands out ranges of [0, infinity) in units of `granule_bytes`; joins freed neighbours."""

    def __init__(self, granule_bytes: int) -> None:
        self._granule_bytes = granule_bytes
        self._free: list[tuple[int, int]] = []  # (offset, end), ascending, never adjacent
        self._used: dict[int, int] = {}
        self.end_bytes = 0
        self.used_bytes = 0

    def take(self, n_bytes: int) -> int:
        """Return the offset of a free range of at least `n_bytes` bytes."""
        size_bytes = self.size_of(n_bytes)
        for position, (offset, end) in enumerate(self._free):
            if end - offset >= size_bytes:
                if end - offset == size_bytes:
                    del self._free[position]
                else:
                    self._free[position] = (offset + size_bytes, end)
                break
        else:
            offset = self._extend(size_bytes)
        self._used[offset] = size_bytes
        self.used_bytes += size_bytes
        return offset

    def size_of(self, n_bytes: int) -> int:
        """Return what a request of `n_bytes` occupies."""
        return max(1, -(-n_bytes // self._granule_bytes)) * self._granule_bytes

    def free(self, offset: int) -> None:
        """Give back the range that `take` returned at `offset`."""
        size_bytes = self._used.pop(offset)
        self.used_bytes -= size_bytes
        end = offset + size_bytes
        position = bisect_left(self._free, (offset, end))
        if position < len(self._free) and self._free[position][0] == end:
            end = self._free.pop(position)[1]
        if position > 0 and self._free[position - 1][1] == offset:
            position -= 1
            offset = self._free.pop(position)[0]
        insort(self._free, (offset, end))

    def _extend(self, size_bytes: int) -> int:
        """Make room at the end, using a free range that touches it."""
        offset = self.end_bytes
        if self._free and self._free[-1][1] == self.end_bytes:
            offset = self._free.pop()[0]
        self.end_bytes = offset + size_bytes
        return offset
