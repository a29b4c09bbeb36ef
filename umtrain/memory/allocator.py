"""What becomes of large buffers that are freed: kept for the next ones, or handed back.

Where there is a C++ compiler torch's buffers come from a pool of pages (`PagePool`): with
`RECYCLE` the next buffers get their pages, with `GIVE_BACK` the kernel, with `RECYCLE_STRIPS` the
next ones up to 64 MiB. What others malloc, and torch's without the pool, is glibc's, which by
default maps buffers above a threshold that grows up to 32 MiB afresh, zeroed and faulted in, each
time. There the choices are:

- `RECYCLE`: freed buffers stay in the heap and are used again. No page faults; but large and small
  buffers share one heap, which fragments.
- `GIVE_BACK`: every buffer above 1 MiB is a mapping of its own, gone when freed. Device memory
  in use is what is alive, nothing more; the price is a page fault per page per use.
- `RECYCLE_STRIPS`: the former up to 64 MiB, the latter above. Strips come and go by the thousand;
  an image leaves a hole that small buffers would settle in, and the next image would not fit.

Strategies that take time to save memory must not lose it to glibc's heap: `HeapHoles`.

`scripts/bench_memory.py allocator` measures all of them on your machine.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import Enum

from umtrain.memory import linux
from umtrain.memory.linux import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, mallopt
from umtrain.memory.page_pool import KEEP_ALL, PagePool, install_page_pool

_LARGEST_HOLE_BYTES = 2**30
_SMALLEST_HOLE_BYTES = 2**20
_ALLOWED_HOLE_BYTES = 64 * 2**20
_ALLOWED_HOLE_SHARE = 1 / 8
_ALLOWED_LARGEST_HOLES = 2


class FreedBuffers(Enum):
    """M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (-1 never trims), and what the pool keeps, in bytes."""

    GLIBC = (32 * 2**20, 64 * 2**20, 0)
    RECYCLE = (2**30, -1, KEEP_ALL)
    RECYCLE_STRIPS = (64 * 2**20, -1, 64 * 2**20)
    GIVE_BACK = (2**20, 2**20, 0)


_current = FreedBuffers.GLIBC
_pool: PagePool | None = None


def set_freed_buffers(choice: FreedBuffers) -> FreedBuffers:
    """Choose for the whole process what happens to freed buffers; returns the choice before.

    Where there is no pool and the C library is not glibc, nothing changes.
    """
    global _current
    before = _current
    mmap_bytes, trim_bytes, kept_bytes = choice.value
    if _pool is not None:
        # No tensor can use what lies in the heap.
        mmap_bytes = min(mmap_bytes, FreedBuffers.RECYCLE_STRIPS.value[0])
    if mallopt(M_MMAP_THRESHOLD, mmap_bytes) and mallopt(M_TRIM_THRESHOLD, trim_bytes):
        _current = choice
    if _pool is not None:
        _pool.keep_up_to(kept_bytes)
    return before


def has_page_pool() -> bool:
    """Return whether torch's buffers in this process come from the pool of pages."""
    return _pool is not None


def give_back_free_memory() -> None:
    """Give the kernel what the pool and the heap have free."""
    if _pool is not None:
        _pool.give_back()
    linux.trim_heap()


@contextmanager
def giving_back() -> Generator[None]:
    """Have large buffers go back to the kernel when they are freed inside the block."""
    before = set_freed_buffers(FreedBuffers.GIVE_BACK)
    try:
        yield
    finally:
        set_freed_buffers(before)


class HeapHoles:
    """Keeps what glibc's heap, without a pool, holds beside what is alive small, at few faults.

    # Note: [Holes that grow]
    # Small objects settle between freed buffers, so holes no longer fit the next buffer and the
    # heap grows: under `lms` to more than twice of what is alive. Once the resident set is
    # `_allowed_hole_bytes` over the most that was alive when holes were last given back, they are
    # again. What is used after that is faulted in anew: ResUNet35 at 1024 pixels pays with 1 GiB
    # of faults, a tenth of a step, for 40% less memory.
    """

    def __init__(self, largest_bytes: int) -> None:
        """`largest_bytes` is the largest of the buffers that come and go."""
        self._largest_bytes = largest_bytes
        self._base_bytes = linux.rss_bytes()
        self._most_bytes = self._base_bytes + _allowed_hole_bytes(0, largest_bytes)

    def limit(self) -> None:
        """Give free pages back if the resident set has grown too much; for calling often."""
        if _pool is not None:
            return  # its pages fit the next buffer, whatever its size
        if _current is not FreedBuffers.RECYCLE or linux.rss_bytes() <= self._most_bytes:
            return
        linux.trim_heap()
        resident_bytes = linux.rss_bytes()
        alive_bytes = max(0, resident_bytes - self._base_bytes)
        most_bytes = resident_bytes + _allowed_hole_bytes(alive_bytes, self._largest_bytes)
        self._most_bytes = max(self._most_bytes, most_bytes)


def _allowed_hole_bytes(alive_bytes: int, largest_bytes: int) -> int:
    """Return what holes may take beside buffers of `alive_bytes`, see `HeapHoles`."""
    share_bytes = int(_ALLOWED_HOLE_SHARE * alive_bytes)
    return max(_ALLOWED_HOLE_BYTES, share_bytes, _ALLOWED_LARGEST_HOLES * largest_bytes)


def close_heap_holes() -> Callable[[], None]:
    """Take what the heap has free out of use, in pieces of at least 1 MiB; returns the undoing.

    A heap that was used holds free memory that stays mapped. From now on every buffer above
    1 MiB is a mapping of its own (with `GIVE_BACK`, which has to be chosen), so the kernel sees
    it. What is taken is never touched, and costs address space alone.
    """
    give_back_free_memory()
    taken: list[int] = []
    n_bytes = _LARGEST_HOLE_BYTES
    while n_bytes >= _SMALLEST_HOLE_BYTES:
        address = _malloc_from_hole(n_bytes)
        if address:
            taken.append(address)
        else:
            n_bytes //= 2

    def reopen() -> None:
        while taken:
            linux.free(taken.pop())

    return reopen


def _malloc_from_hole(n_bytes: int) -> int:
    """Return a buffer that the heap had free; 0 if it would have to be mapped."""
    n_mappings = linux.heap_mappings()
    if n_mappings is None:
        return 0
    address = linux.malloc(n_bytes)
    if address and linux.heap_mappings() != n_mappings:
        linux.free(address)
        return 0
    return address


def recycle_large_buffers(device_kind: str) -> FreedBuffers:
    """Keep what is freed for the next buffers; in a process that trains.

    On the CPU in the pool of pages; without that, and beside a GPU, in glibc's heap. Returns the
    choice before.
    """
    global _pool
    if device_kind == "cpu":
        _pool = install_page_pool()
    return set_freed_buffers(FreedBuffers.RECYCLE)
