"""Many files at once, in processes of their own."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from umtrain.processes import deaf_to_interrupts

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    write: Callable[[Job], Result], jobs: list[Job], processes: int
) -> Iterator[Result]:
    """Yield write(job) for each job, in order, as they are done.

    An error, or an interrupt, ends the others at once.
    """
    if processes <= 1 or len(jobs) == 1:
        yield from map(write, jobs)
        return
    # Spawned, not forked: the parent may run threads (torch, a progress bar).
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        try:
            with deaf_to_interrupts():
                results = pool.map(write, jobs)
            yield from results
        except BaseException:  # do not make the rest only to throw it away
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - set(others):
                child.kill()
            raise
