"""The calls of Linux and glibc that the CPU tier stands on.

ctypes releases the GIL around each call, which `mmap.madvise` may not do.
"""

import ctypes
import os
import resource
import sys
from pathlib import Path

from umtrain.errors import DeviceError

_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_PAGEOUT = 21
_MADV_POPULATE_READ = 22
_FALLOC_FL_ZERO_RANGE = 0x10
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

PAGE_BYTES = resource.getpagesize()
HUGE_PAGE_BYTES = 2 * 2**20


def is_linux() -> bool:
    """Return whether the calls of this module exist here."""
    return sys.platform.startswith("linux")


def require_linux(what: str) -> None:
    """Raise DeviceError, naming `what` needs it, on any other system than Linux."""
    if not is_linux():
        raise DeviceError(f"{what} needs Linux; this system is {sys.platform}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{call}: {os.strerror(errno)}")


def mallopt(parameter: int, value: int) -> bool:
    """Set a parameter of glibc's allocator; False if there is no such allocator."""
    set_parameter = getattr(_libc(), "mallopt", None)
    return set_parameter is not None and set_parameter(parameter, value) == 1


def trim_heap() -> None:
    """Give the pages of free memory in glibc's heap back to the kernel."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap_mappings() -> int | None:
    """Return how many buffers of glibc's heap are mappings of their own; None without glibc."""
    info = getattr(_libc(), "mallinfo2", None)  # glibc 2.33
    if info is None:
        return None
    info.restype = _MallocInfo
    return int(info().hblks)


def malloc(n_bytes: int) -> int:
    """Return the address of a buffer from the C heap; 0 if it has none."""
    allocate = _libc().malloc
    allocate.restype = ctypes.c_void_p
    return allocate(ctypes.c_size_t(n_bytes)) or 0


def free(address: int) -> None:
    """Free what `malloc` returned."""
    _libc().free(ctypes.c_void_p(address))


def _madvise(address: int, n_bytes: int, advice: int) -> None:
    result = _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), advice)
    _check(result, f"madvise(advice={advice})")


def populate_read(address: int, n_bytes: int) -> None:
    """Read pages in and map them, in one call instead of one fault per window."""
    _madvise(address, n_bytes, _MADV_POPULATE_READ)


def page_out(address: int, n_bytes: int) -> None:
    """Take clean pages out of RAM; dirty ones are unmapped but stay in the page cache."""
    _madvise(address, n_bytes, _MADV_PAGEOUT)


def use_huge_pages(address: int, n_bytes: int) -> bool:
    """Let a range be backed by huge pages as it is touched; False if this kernel has none."""
    try:
        _madvise(address, n_bytes, _MADV_HUGEPAGE)
    except OSError:
        return False
    return True


def keep_from_children(address: int, n_bytes: int) -> None:
    """Leave a mapping out of forked children, which must not share saved tensors."""
    _madvise(address, n_bytes, _MADV_DONTFORK)


def write_back(fd: int, offset: int, n_bytes: int) -> None:
    """Write a file's dirty pages to disk and wait; they stay in the page cache, clean."""
    result = _libc().sync_file_range(
        fd,
        ctypes.c_int64(offset),
        ctypes.c_int64(n_bytes),
        ctypes.c_uint(_SYNC_FILE_RANGE_WRITE_AND_WAIT),
    )
    _check(result, "sync_file_range")


def discard(fd: int, offset: int, n_bytes: int) -> bool:
    """Drop a range's content from RAM without writing it, keeping its disk space.

    Returns False where the filesystem cannot; nothing has changed then.
    """
    result = _libc().fallocate(
        fd, _FALLOC_FL_ZERO_RANGE, ctypes.c_int64(offset), ctypes.c_int64(n_bytes)
    )
    return bool(result == 0)


def resident_bytes(address: int, n_bytes: int) -> int:
    """Return how many bytes of a page-aligned mapping are in RAM (mincore)."""
    n_pages = -(-n_bytes // PAGE_BYTES)
    flags = (ctypes.c_ubyte * n_pages)()
    result = _libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), flags)
    _check(result, "mincore")
    return sum(flag & 1 for flag in flags) * PAGE_BYTES


def process_status() -> dict[str, int]:
    """Return the sizes of /proc/self/status in bytes: VmData, VmRSS, VmHWM, …; {} elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, _ in sizes}


def rss_bytes() -> int:
    """Return the resident set, for asking often; 0 on another system than Linux."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


def data_bytes() -> int:
    """Return the private writable memory of this process, which RLIMIT_DATA caps."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * PAGE_BYTES


def reset_peak_rss() -> bool:
    """Let VmHWM count afresh; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def major_faults() -> int:
    """Return how many page faults of this process have had to read from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
