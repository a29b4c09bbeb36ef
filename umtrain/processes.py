"""Child processes that do not outlive who started them, and leave Ctrl-C to that one."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have this process, just forked, get SIGTERM when its parent ends, however that ends.

    Linux only; elsewhere the parent has to see to it. See prctl(2).
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Have processes that this thread starts in the block never hear SIGINT and SIGUSR1.

    A terminal sends Ctrl-C to all of them, from their first import on. It is for this process to
    answer, which ends them.
    """
    resource_tracker.ensure_running()  # as it starts, it lets through what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
