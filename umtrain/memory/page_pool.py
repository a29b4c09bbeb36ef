"""torch's CPU memory from a pool of pages, compiled by this machine's C++ compiler when needed.

What is resident of buffers is what was alive at most, with no page faults for what comes and goes,
where glibc's heap has either holes or faults: see page_pool.cpp.
"""

import ctypes
import logging
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from umtrain.compiler import compiled, cpp_compiler, failure_of
from umtrain.memory.linux import is_linux

_log = logging.getLogger(__name__)

_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC")
_TORCH = Path(torch.__file__).parent
KEEP_ALL = 2**64 - 1


class PoolCounts(NamedTuple):
    """Bytes in buffers, free for the next ones, ever asked of the kernel, and ever moved."""

    alive: int
    free: int
    fresh: int
    moved: int


class PagePool:
    """Where torch's CPU buffers of a mebibyte and more come from, once this exists."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.umtrain_install()

    def keep_up_to(self, n_bytes: int) -> None:
        """Give larger buffers back to the kernel when they are freed, from now on."""
        self._library.umtrain_keep_up_to(ctypes.c_size_t(n_bytes))

    def give_back(self) -> None:
        """Give what is free back to the kernel."""
        self._library.umtrain_give_back()

    def counts(self) -> PoolCounts:
        """Return what the pool holds now."""
        found = (ctypes.c_size_t * len(PoolCounts._fields))()
        self._library.umtrain_counts(found)
        return PoolCounts(*found)


@cache
def install_page_pool() -> PagePool | None:
    """Return the pool of this process, installed by the first call; None, said once, without one.

    Buffers that torch has already stay where they are.
    """
    if not is_linux():
        return None
    include, libraries = f"-I{_TORCH / 'include'}", (f"-L{_TORCH / 'lib'}", "-lc10")
    source = Path(__file__).with_name("page_pool.cpp")
    flags = (*_FLAGS, f"-DUMTRAIN_MADE_FOR_TORCH={torch.__version__}", include)
    try:
        return PagePool(ctypes.CDLL(str(compiled(cpp_compiler(), [source], flags, libraries))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info(
            "no page pool (%s): freed memory stays in glibc's heap, whose holes can double what "
            "a step takes. Install a compiler of C++20 (c++) to change that",
            failure_of(error),
        )
        return None
