"""Threads that do the CPU tier's reading and writing."""

from concurrent.futures import ThreadPoolExecutor

import torch


def start_io_thread(name: str) -> ThreadPoolExecutor:
    """Return an executor of one thread that runs already, with all it will ever need set up.

    A thread that starts under a tight device budget may find no memory for its stack or its
    thread-local data, which ends the process.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    executor.submit(torch.empty, 1).result()
    return executor
