"""Many files at once, in processes of their own."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
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
    n_workers = min(processes, len(jobs))
    left = iter(jobs)
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        try:
            # Few at a time, so that none has to be cancelled: a pool that breaks while it cancels
            # prints a traceback (InvalidStateError, Python 3.11).
            with deaf_to_interrupts():
                begun = deque(pool.submit(write, job) for job in islice(left, 2 * n_workers))
            while begun:
                result = begun.popleft().result()
                begun.extend(pool.submit(write, job) for job in islice(left, 1))
                yield result
        except BaseException:  # do not make the rest only to throw it away
            for child in set(multiprocessing.active_children()) - set(others):
                child.kill()
            raise
