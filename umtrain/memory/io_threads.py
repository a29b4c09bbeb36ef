"""Threads that do the CPU tier's reading and writing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def start_io_threads(name: str, n_threads: int = 1) -> ThreadPoolExecutor:
    """Return an executor whose threads run already, with all they will ever need set up.

    A thread that starts under a tight device budget may find no memory for its stack or its
    thread-local data, which ends the process.
    """
    executor = ThreadPoolExecutor(n_threads, thread_name_prefix=name)
    all_there = threading.Barrier(n_threads)

    def set_up() -> None:
        torch.empty(1)
        all_there.wait()

    for started in [executor.submit(set_up) for _ in range(n_threads)]:
        started.result()
    return executor
