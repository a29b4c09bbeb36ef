"""What umtrain survives, counted: kills, damaged and hostile input, injected faults.

    python scripts/robustness.py [--kills 100] [--files 500] [--rows 1000000] [--seed 0]

Runs scripts/kill_test.py, scripts/fuzz_inputs.py and the tests that have the marker `fault`, which
names what is injected and what has to come of it, one after the other. Their own output goes to
stderr. Prints a table of the faults, one of the counts, and as its last line one JSON object; ends
with 1 if anything differed, was unexplained, or came out otherwise.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]
_AS_SAID, _OTHERWISE, _NOT_INJECTED = "as said", "otherwise", "not injected here"


class Faults:
    """A plugin of pytest: what each test with the marker `fault` injects, and how that went."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], str] = {}

    @property
    def rows(self) -> list[dict[str, str]]:
        return [
            {"fault": fault, "outcome": outcome, "came": came}
            for (fault, outcome), came in self._found.items()
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report = yield
        came = {"passed": _AS_SAID, "failed": _OTHERWISE, "skipped": _NOT_INJECTED}[report.outcome]
        for mark in item.iter_markers("fault"):
            before = self._found.get(mark.args, _AS_SAID)
            # A test has three phases, and may have several parameters: the worst of them counts.
            self._found[mark.args] = max(
                before, came, key=[_AS_SAID, _NOT_INJECTED, _OTHERWISE].index
            )
        return report


def main() -> int:
    options = _options()
    seed = ["--seed", str(options.seed)]
    killed = _figures("kill_test.py", "--kills", str(options.kills), *seed)
    fuzzed = _figures(
        "fuzz_inputs.py", "--n", str(options.files), "--rows", str(options.rows), *seed
    )
    faults = _inject_faults()
    came = Counter(row["came"] for row in faults)
    outcomes = fuzzed["outcomes"]
    figures = {
        "kills": killed["kills"],
        "runs_killed": sum(killed["runs"].values()),
        "differences": len(killed["differences"]),
        "left_behind": len(killed["left_behind"]),
        "files": fuzzed["n"],
        "manifests": sum(outcomes["manifests"].values()),
        "configs": sum(outcomes["configs"].values()),
        "unexplained": fuzzed["wrong"],
        "faults": came[_AS_SAID] + came[_OTHERWISE],
        "faults_otherwise": came[_OTHERWISE],
        "faults_not_injected": came[_NOT_INJECTED],
    }
    _show(figures, faults)
    print(json.dumps({**figures, "by_signal": killed["by_signal"], "injected": faults}))
    bad = ("differences", "left_behind", "unexplained", "faults_otherwise")
    return int(not faults or any(figures[key] for key in bad))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--files", type=int, default=500, help="damaged image files")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest manifest")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _figures(script: str, *words: str) -> dict[str, Any]:
    """Run a script of this folder; return the JSON of its last line, however it ended."""
    command = [sys.executable, Path(__file__).with_name(script), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise SystemExit(f"{script} ended with exit code {done.returncode} and no figures")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def _inject_faults() -> list[dict[str, str]]:
    """Run the tests that inject a fault; return what each injects, and what came of it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(CHECKOUT)
    faults = Faults()
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(["-m", "fault", "tests"], plugins=[faults])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code!r}: not all faults were injected")
    return faults.rows


def _show(figures: dict[str, int], faults: list[dict[str, str]]) -> None:
    width = max((len(row["fault"]) for row in faults), default=0)
    for row in faults:
        came = "" if row["came"] == _AS_SAID else f"  ({row['came'].upper()})"
        print(f"{row['fault']:<{width}}  {row['outcome']}{came}")
    print()
    for key, value in figures.items():
        print(f"{key.replace('_', ' '):<{width}}  {value:>6}")


if __name__ == "__main__":
    sys.exit(main())
