"""Reads and writes at offsets of a file, past the page cache where that is possible.

# Note: [Past the page cache]
# Copying to the page cache costs a core more than the disk takes, and computing threads wait for
# that core at every barrier: measured 0.55 s of CPU per GiB against 0.03 s. Direct I/O wants
# address, offset and size aligned. Memory that lies as its place in the file does, modulo the
# alignment, goes directly but for its ends; all other memory goes through the cache. Both see the
# same bytes: the kernel writes cached pages out before it reads them directly.
"""

import errno
import logging
import os
from collections.abc import Iterator
from mmap import mmap

import torch

from umtrain.streaming.storage import ALIGNMENT_BYTES

_log = logging.getLogger(__name__)

_LARGEST_CALL_BYTES = 2**30
_CACHED_TEXT = (
    "the spill file goes through the page cache, which is slower: no direct I/O here (%s)"
)


class PositionedFile:
    """An open file and, if asked for and possible here, a second way into it by direct I/O."""

    def __init__(self, fd: int, is_direct: bool) -> None:
        self._fd = fd
        self._direct_fd = _open_direct(fd) if is_direct else -1

    @property
    def is_direct(self) -> bool:
        """Return whether aligned parts go past the page cache."""
        return self._direct_fd >= 0

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write `source`, dense uint8, at `offset`; raises OSError."""
        for fd, start, stop in self._runs(offset, source):
            rest, position = source[start:stop].numpy().data, offset + start
            while rest:
                n_bytes = os.pwrite(fd, rest[:_LARGEST_CALL_BYTES], position)
                rest, position = rest[n_bytes:], position + n_bytes

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target`, dense uint8, from `offset`; raises OSError."""
        for fd, start, stop in self._runs(offset, target):
            rest, position = target[start:stop].numpy().data, offset + start
            while rest:
                n_bytes = os.preadv(fd, [rest[:_LARGEST_CALL_BYTES]], position)
                if n_bytes == 0:
                    raise OSError(errno.EIO, "the file ends too early")
                rest, position = rest[n_bytes:], position + n_bytes

    def _runs(self, offset: int, memory: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        """Yield (file, first byte, end) of the parts of `memory` and how they go."""
        n_bytes = memory.nbytes
        start = min(-offset % ALIGNMENT_BYTES, n_bytes)
        stop = n_bytes - (offset + n_bytes) % ALIGNMENT_BYTES
        congruent = (memory.data_ptr() - offset) % ALIGNMENT_BYTES == 0
        if not (self.is_direct and congruent and stop > start):
            start, stop = n_bytes, n_bytes
        runs = ((self._fd, 0, start), (self._direct_fd, start, stop), (self._fd, stop, n_bytes))
        yield from (run for run in runs if run[2] > run[1])

    def close(self) -> None:
        """Close the second way; the file itself is its owner's."""
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1


def _open_direct(fd: int) -> int:
    """Open the file behind `fd` again, for direct I/O; -1 if its filesystem has none."""
    try:
        direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        _log.info(_CACHED_TEXT, error.strerror)
        return -1
    if _works(fd, direct_fd):
        return direct_fd
    os.close(direct_fd)
    return -1


def _works(fd: int, direct_fd: int) -> bool:
    """Try: some filesystems take the flag and refuse the transfer, or want more alignment."""
    try:
        os.posix_fallocate(fd, 0, ALIGNMENT_BYTES)
        with mmap(-1, ALIGNMENT_BYTES) as page:  # mappings are aligned
            return os.pwrite(direct_fd, page, 0) == ALIGNMENT_BYTES
    except OSError as error:
        _log.info(_CACHED_TEXT, error.strerror)
        return False
