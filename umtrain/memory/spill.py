"""The spill file: the host tier of a machine without a GPU.

One unnamed file (nothing is left behind after a kill), with its space reserved before it is
used, and one shared mapping of it. Shared file mappings are exempt from RLIMIT_DATA.
"""

import ctypes
import errno
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from mmap import ACCESS_WRITE, mmap
from pathlib import Path

import torch

from umtrain.errors import DeviceError, OutOfMemoryError
from umtrain.memory import linux
from umtrain.memory.arena import Arena
from umtrain.memory.layout import Layout, span_of
from umtrain.memory.positioned import PositionedFile
from umtrain.units import format_bytes

_GRANULE_BYTES = 64 * 1024
_GROWTH_BYTES = 64 * 2**20


class SpillBlock:
    """A range of the spill file; free again once nothing refers to this object."""

    def __init__(self, spill: "SpillFile", offset: int, n_bytes: int) -> None:
        self.spill = spill
        self.offset = offset
        self.n_bytes = n_bytes

    @property
    def address(self) -> int:
        """Return where the block is mapped."""
        return self.spill.address + self.offset

    def write(self, tensor: torch.Tensor, layout: Layout) -> None:
        """Copy the span of storage that `tensor` uses into the block.

        Unlike a copy into the mapping this faults no page and reads none back first.
        """
        self.write_at(layout.lead_bytes, span_of(tensor, layout.span_bytes))

    def read_into(self, room: torch.Tensor, offset: int = 0) -> None:
        """Fill `room`, uint8, with the block's bytes from `offset` on."""
        with self.spill.naming_itself():
            self.spill.file.read(self.offset + offset, room)

    def write_at(self, offset: int, source: torch.Tensor) -> None:
        """Copy `source`, uint8, to the block from `offset` on."""
        with self.spill.naming_itself():
            self.spill.file.write(self.offset + offset, source)

    def as_bytes(self) -> torch.Tensor:
        """Return the block as a uint8 tensor on the mapping; the tensor keeps the block taken."""
        buffer = (ctypes.c_ubyte * self.n_bytes).from_address(self.address)
        vars(buffer)["block"] = self
        return torch.frombuffer(buffer, dtype=torch.uint8)


class SpillFile:
    """An unnamed file in `directory`, mapped whole, that hands out blocks.

    With `is_direct` its blocks are read and written past the page cache where that is possible.
    Raises DeviceError if the directory cannot be written, and OutOfMemoryError if it has not
    `reserve_bytes` to give.
    """

    def __init__(
        self,
        directory: Path | None,
        reserve_bytes: int = 0,
        limit_bytes: int | None = None,
        on_free: Callable[[int], None] = lambda offset: None,
        is_direct: bool = False,
    ) -> None:
        linux.require_linux("The spill file")
        self.directory = directory or Path(tempfile.gettempdir())
        self._limit_bytes = limit_bytes
        self._arena = Arena(_GRANULE_BYTES)
        self._on_free = on_free
        self._freed: deque[int] = deque()  # Note: [Blocks freed by finalizers]
        self._lock = threading.Lock()
        self._reserved_bytes = 0
        self.fd = _open_unnamed(self.directory)
        self.file = PositionedFile(self.fd, is_direct)
        try:
            self._map()
            self.reserve(reserve_bytes)
        except BaseException:
            self.close()
            raise

    def _map(self) -> None:
        # The mapping is as long as the file may ever become: addresses never change. Only
        # reserved parts are touched, so it costs address space alone.
        free_bytes = os.statvfs(self.fd).f_bavail * os.statvfs(self.fd).f_frsize
        n_bytes = self._limit_bytes or free_bytes
        self.capacity_bytes = max(_GROWTH_BYTES, -(-n_bytes // _GROWTH_BYTES) * _GROWTH_BYTES)
        os.ftruncate(self.fd, self.capacity_bytes)
        self._mapping = mmap(self.fd, self.capacity_bytes, access=ACCESS_WRITE)
        anchor = ctypes.c_ubyte.from_buffer(self._mapping)
        self.address = ctypes.addressof(anchor)
        linux.keep_from_children(self.address, self.capacity_bytes)

    def reserve(self, n_bytes: int) -> None:
        """Make sure that the first `n_bytes` bytes of the file are backed by disk space."""
        if n_bytes <= self._reserved_bytes:
            return
        if self._limit_bytes is not None and n_bytes > self._limit_bytes:
            raise OutOfMemoryError(
                f"host memory ran out: {format_bytes(n_bytes)} are needed and "
                f"memory.host_budget={format_bytes(self._limit_bytes)}; raise it or lower res"
            )
        target_bytes = min(-(-n_bytes // _GROWTH_BYTES) * _GROWTH_BYTES, self.capacity_bytes)
        try:
            if n_bytes > target_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._reserved_bytes = self._back(target_bytes, n_bytes)
        except OSError as error:
            raise self._no_room(n_bytes, error) from error

    def _back(self, wanted_bytes: int, needed_bytes: int) -> int:
        """Back the first `wanted_bytes` by disk space, or `needed_bytes`; return which it was."""
        try:
            os.posix_fallocate(self.fd, 0, wanted_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.posix_fallocate(self.fd, 0, needed_bytes)
            return needed_bytes
        return wanted_bytes

    def _no_room(self, n_bytes: int, error: OSError) -> OutOfMemoryError:
        free = os.statvfs(self.fd)
        free_bytes = free.f_bavail * free.f_frsize
        return OutOfMemoryError(
            f"host memory ran out: memory.spill_dir={self.directory} has not the room for saved "
            f"tensors: {format_bytes(n_bytes)} are needed, {format_bytes(free_bytes)} "
            f"are free ({error.strerror}); free some, lower res or choose another directory"
        )

    def write_back(self, offset: int, n_bytes: int) -> None:
        """Write the dirty pages of a range to disk and wait."""
        with self.naming_itself():
            linux.write_back(self.fd, offset, n_bytes)

    @contextmanager
    def naming_itself(self) -> Generator[None]:
        """Name the disk in what it answers: it may fill up, or fail, in mid-training.

        A full disk is OutOfMemoryError, as it is host memory; any other failure DeviceError.
        """
        try:
            yield
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = OutOfMemoryError if is_full else DeviceError
            raise kind(
                f"{'host memory ran out: ' if is_full else ''}memory.spill_dir={self.directory}: "
                f"the spill file could not be read or written ({error.strerror}); free some of "
                "that disk or choose another directory"
            ) from error

    def take(self, n_bytes: int) -> SpillBlock:
        """Return a free block; raises DeviceError or OutOfMemoryError if there is none."""
        with self._lock:
            self._collect()
            offset = self._arena.take(n_bytes)
            try:
                self.reserve(self._arena.end_bytes)
            except BaseException:
                self._arena.free(offset)
                raise
        block = SpillBlock(self, offset, n_bytes)
        # Note: [Blocks freed by finalizers]
        # A finalizer may run in any thread, between any two operations, also under our own
        # lock; it only appends, which is atomic, and `take` frees what was appended.
        weakref.finalize(block, self._freed.append, offset).atexit = False
        return block

    def collect(self) -> None:
        """Free the blocks that nothing refers to any more, telling `on_free` of each."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        while self._freed:
            offset = self._freed.popleft()
            self._on_free(offset)
            self._arena.free(offset)

    @property
    def used_bytes(self) -> int:
        """Return the bytes of all blocks that are taken."""
        with self._lock:
            self._collect()
            return self._arena.used_bytes

    def close(self) -> None:
        """Close the file; its disk space is free once the last tensor on the mapping is gone."""
        if self.fd >= 0:
            self.file.close()
            os.close(self.fd)
            self.fd = -1


def _open_unnamed(directory: Path) -> int:
    """Open a file without a name, so that no end of the process can leave it behind."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, os.O_TMPFILE | flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise _not_writable(directory, error) from error
    try:
        fd, path = tempfile.mkstemp(prefix="umtrain-spill-", dir=directory)
    except OSError as error:
        raise _not_writable(directory, error) from error
    Path(path).unlink()
    return fd


def _not_writable(directory: Path, error: OSError) -> DeviceError:
    return DeviceError(
        f"memory.spill_dir={directory} cannot hold the spill file ({error.strerror}); "
        "name an existing directory that you may write to, on a disk with room"
    )
