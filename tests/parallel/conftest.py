"""Real processes that train together, started once and used by many tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MAIN = Path(__file__).with_name("rank_main.py")
Run = Callable[..., list[Any]]


class Crew:
    """`n_ranks` processes that run the cases of rank_main.py together."""

    def __init__(self, n_ranks: int, store: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, str(MAIN), str(store), str(rank), str(n_ranks)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(n_ranks)
        ]

    def run(self, case: str, **arguments: Any) -> list[Any]:
        """Return what each rank answers."""
        answers = self.ask(case, **arguments)
        assert all(answers), "a rank has ended; what it said is on standard error"
        return answers

    def ask(self, case: str, **arguments: Any) -> list[Any]:
        """Return what each rank answers; None for one that ended."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps({"case": case, **arguments}) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self._ranks if rank.stdout is not None]
        return [json.loads(answer) if answer else None for answer in answers]

    def close(self) -> None:
        for rank in self._ranks:  # of all, before any is waited for: they end together
            if rank.stdin is not None:
                rank.stdin.close()
        for rank in self._ranks:
            with rank:  # waits, and closes what is left open
                pass


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Crew]]:
    """Return what gives the crew of so many ranks."""
    crews: dict[int, Crew] = {}

    def of(n_ranks: int) -> Crew:
        if n_ranks not in crews:
            store = tmp_path_factory.mktemp("ranks") / f"store-{n_ranks}"
            crews[n_ranks] = Crew(n_ranks, store)
        return crews[n_ranks]

    yield of
    for one in crews.values():
        one.close()


@pytest.fixture
def short_crew(tmp_path: Path) -> Iterator[Crew]:
    """Two ranks of a test's own, which may end in it."""
    one = Crew(2, tmp_path / "store")
    yield one
    one.close()
