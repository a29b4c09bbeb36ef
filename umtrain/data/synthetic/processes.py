"""Many files at once, in processes of their own."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    write: Callable[[Job], Result], jobs: list[Job], processes: int
) -> Iterator[Result]:
    """Yield write(job) for each job, in order, as they are done."""
    if processes <= 1 or len(jobs) == 1:
        yield from map(write, jobs)
        return
    # Spawned, not forked: the parent may run threads (torch, a progress bar).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        try:
            yield from pool.map(write, jobs)
        except BaseException:  # do not make the rest only to throw it away
            pool.shutdown(cancel_futures=True)
            raise
