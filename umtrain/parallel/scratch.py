"""Where ranks but the first put what only the first one's is kept of."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from umtrain.parallel.world import world


@contextmanager
def run_dir_of_rank(choose: Callable[[], Path]) -> Iterator[Path]:
    """Yield the run directory that `choose` returns; to other ranks a folder that is then removed.

    So all ranks run the same code, and what a run keeps is written once.
    """
    here = world()
    if here.is_main:
        chosen = choose()
        here.least(0)  # a choice that is refused ends all before they begin
        yield chosen
        return
    here.least(0)
    with tempfile.TemporaryDirectory(prefix="umtrain-rank-") as folder:
        yield Path(folder)
