"""Kills real training processes at random instants and checks that nothing is lost.

    python scripts/kill_test.py --kills 100 [--variants slides,films] [--seed 0] [--folder DIR]

Every run is started again and again with the same command, and killed (SIGKILL, or asked to end by
SIGTERM, SIGUSR1 or SIGINT) at random instants: anywhere, while a checkpoint is being written, while
it evaluates and reports. Once it has ended, its final weights, optimizer, random generators, best
weights, steps.csv, predictions.csv and metrics have to be those of a run that was never
interrupted, to the bit. A session is forked from a process that has the imports behind it, so that
it costs what it trains; before that a process has touched nothing.

Prints one line of JSON; the exit code is 1 if anything differed or was left behind. A run that ends
otherwise than it may stays in the folder, and what it said last is in the JSON.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

VARIANTS = {
    "slides": (
        "dataset=wsi",
        "model=resnet18",
        "res=64",
        "epochs=2",
        "optim=sgd",
        "memory=vanilla",
    ),
    "slides_lms": (
        *("dataset=wsi", "model=resnet18", "res=64", "epochs=2", "optim=adamw", "memory=lms"),
        *("cases=0", "optim.accumulate=2", "optim.schedule=plateau", "memory.spill_dir=spill"),
    ),
    "slides_readers": (
        *("dataset=wsi", "model=resnet18", "res=64", "epochs=2", "optim=sgd", "cases=0"),
        *("batch_size=2", "dataset.workers=1", "memory=stream"),
    ),
    "patches": (
        *("dataset=wsi", "model=resnet18", "approach=two_stage", "res=64", "epochs=2"),
        *("batch_size=4", "dataset.patches_per_slide=4", "memory=vanilla", "optim=sgd"),
    ),
    "films": ("dataset=spine", "res=128", "epochs=2", "memory=um_group_prefetch"),
}
COMMON = ("precision=fp32", "checkpoint_minutes=0.01", "run_dir=run")
_MEASURED = ("step_s", "data_wait_s")
_MOST_KILLS_A_RUN = 8
SAID = "session.txt"
_N_SHOWN_LINES = 6


@dataclass
class Tally:
    """What happened, counted."""

    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "kills": self.kills.total(),
            "by_signal": dict(self.kills),
            "by_phase": dict(self.phases),
            "runs": dict(self.runs),
            "differences": self.differences,
            "left_behind": self.left_behind,
        }


def main() -> int:
    options = _options()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_test-"))
    folder.mkdir(exist_ok=True)
    try:
        tally = campaign(folder, options.variants.split(","), options.kills, options.seed)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(tally.as_json()))
    return int(bool(tally.differences or tally.left_behind))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where runs are made; what went wrong stays there"
    )
    return parser.parse_args()


def campaign(folder: Path, variants: list[str], n_kills: int, seed: int) -> Tally:
    """Kill runs of the variants in turn until there were `n_kills`; return the counts."""
    tally, rng = Tally(), random.Random(seed)
    _prepare(folder)
    references: dict[str, tuple[dict[str, Any], float]] = {}
    while tally.kills.total() < n_kills and not tally.differences:
        for name in variants:
            if name not in references:
                references[name] = _reference(folder / f"{name}-reference", folder, name)
            left = n_kills - tally.kills.total()
            if left > 0:
                expected, length_s = references[name]
                run = folder / f"{name}-{tally.runs[name]}"
                most = min(left, _MOST_KILLS_A_RUN)
                if _kill_until_done(run, folder, name, length_s, most, rng, tally):
                    _compare(run, expected, tally)
                    shutil.rmtree(run)
    return tally


def _prepare(folder: Path) -> None:
    """Import what sessions need, once, and make their images."""
    import hydra  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import umtrain.report.html
    import umtrain.runner  # noqa: F401
    from umtrain.data.synthetic.radiographs import make_radiographs
    from umtrain.data.synthetic.slides import make_slides

    for name, make, size_px in (("wsi", make_slides, 256), ("spine", make_radiographs, 512)):
        if not (folder / name).exists():
            (folder / name).mkdir()
            make(folder / name, 8, size_px, 0, None, 1)


def _command(data: Path, name: str) -> list[str]:
    kind = VARIANTS[name][0].partition("=")[2]
    words = ["fit", *VARIANTS[name], *COMMON, f"dataset.manifest={data / kind / 'manifest.csv'}"]
    if not any(word.startswith("dataset.workers=") for word in words):
        words.append("dataset.workers=0")
    return words


def _fork(folder: Path, words: list[str]) -> int:
    """Start a session in `folder`, as a process group of its own; return its process id."""
    sys.stdout.flush()
    # Until the child is where it would be caught, Ctrl-C waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open(SAID, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        from umtrain.cli import main as umtrain

        code = umtrain(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _reference(folder: Path, data: Path, name: str) -> tuple[dict[str, Any], float]:
    """Run a variant without interruption; return what it gave and how many seconds it took."""
    (folder / "spill").mkdir(parents=True)
    start_s = time.monotonic()
    pid = _fork(folder, _command(data, name))
    _, status = os.waitpid(pid, 0)
    length_s = time.monotonic() - start_s
    if status:
        raise SystemExit(f"{name}: {(folder / SAID).read_text()}")
    outcome = _outcome(folder / "run")
    shutil.rmtree(folder)
    return outcome, length_s


def _kill_until_done(
    folder: Path,
    data: Path,
    name: str,
    length_s: float,
    most: int,
    rng: random.Random,
    tally: Tally,
) -> bool:
    """Start the run until it ends by itself; return False if it ended otherwise than it may."""
    (folder / "spill").mkdir(parents=True)
    shared_memory = _shared_memory()
    n_killed, code = 0, None
    tally.runs[name] += 1
    while code != 0:
        started_at_s = time.time()
        pid = _fork(folder, _command(data, name))
        number, phase = None, ""
        if n_killed < most and _wait_for_instant(pid, folder / "run", length_s, rng):
            number, phase = _draw_signal(rng), _phase(folder / "run", started_at_s)
            os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if number is not None:
            _check_ended(pid, tally)
        if code != 0 and number is not None:
            n_killed += 1
            tally.kills[number.name] += 1
            tally.phases[phase] += 1
        if code != 0 and (number is None or code not in (-number, 130)):
            after = "no signal" if number is None else number.name
            said = " | ".join(_last_said(folder))
            tally.differences.append(f"{folder.name}: exit code {code} after {after}: {said}")
            return False
    tally.left_behind += [str(path) for path in (folder / "spill").iterdir()]
    tally.left_behind += [str(path) for path in (folder / "run").rglob(".*")]
    tally.left_behind += sorted(_shared_memory() - shared_memory)
    return True


def _draw_signal(rng: random.Random) -> signal.Signals:
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    return rng.choices(numbers, [7, 1, 1, 1])[0]


def _last_said(folder: Path) -> list[str]:
    return (folder / SAID).read_text(errors="replace").splitlines()[-_N_SHOWN_LINES:]


def _wait_for_instant(pid: int, run: Path, length_s: float, rng: random.Random) -> bool:
    """Wait for a random instant of a session; False if it has ended before."""
    kind = rng.choices(["anywhere", "checkpoint", "report"], [5, 3, 2])[0]
    begun = {
        "anywhere": lambda: True,
        "checkpoint": lambda: any((run / "checkpoints").glob(".*")),
        "report": lambda: (run / "predictions.csv").exists(),
    }[kind]
    span_s = {"anywhere": length_s, "checkpoint": 0.4, "report": 0.4 * length_s}[kind]
    deadline_s = None
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if deadline_s is None and begun():
            deadline_s = time.monotonic() + rng.uniform(0, span_s)
        if deadline_s is not None and time.monotonic() >= deadline_s:
            return True
        time.sleep(0.001)


def _phase(run: Path, started_at_s: float) -> str:
    """Return what a session is doing, by what it has written."""
    if not _is_newer(run / "steps.csv", started_at_s):
        return "start"
    if any((run / "checkpoints").glob(".*")):
        return "checkpoint"
    if any(_is_newer(run / name, started_at_s) for name in ("predictions.csv", "metrics.json")):
        return "evaluation and report"
    return "steps and validation"


def _is_newer(path: Path, than_s: float) -> bool:
    return path.exists() and path.stat().st_mtime > than_s


def _check_ended(session: int, tally: Tally) -> None:
    """Note processes of a killed session that are still there after a while."""
    import psutil

    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == session and process.status() != "zombie":
                    members.append(f"{process.pid} {process.name()}")
        if not members:
            return
        time.sleep(0.05)
    tally.left_behind += [f"process {member}" for member in members]


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {str(path) for path in folder.glob("torch_*")} if folder.exists() else set()


def _outcome(run: Path) -> dict[str, Any]:
    """Return all that a run gave but what it measured: seconds, memory, and what follows."""
    from umtrain.checkpoint import load_checkpoint, step_paths

    state = load_checkpoint(step_paths(run / "checkpoints")[0])
    for key in ("started_at_s", "elapsed_s", "memory_use"):
        state.pop(key)
    steps = state["progress"].pop("steps")
    state["progress"].pop("resumed_after")
    record = json.loads((run / "metrics.json").read_text())
    train = {k: v for k, v in record["train"].items() if k != "resumed_after_steps"}
    with (run / "steps.csv").open() as stream:
        rows = [
            {k: v for k, v in row.items() if k not in _MEASURED} for row in csv.DictReader(stream)
        ]
    return {
        "state": state,
        "losses": steps[:, :5],
        "best": load_checkpoint(run / "checkpoints" / "best.pt"),
        "steps.csv": rows,
        "predictions.csv": (run / "predictions.csv").read_bytes(),
        "metrics": {"train": train, **{key: record[key] for key in ("status", "val", "test")}},
        "checkpoints": [path.name for path in step_paths(run / "checkpoints")][:1],
        "report": (run / "report.html").exists(),
    }


def _compare(run: Path, expected: dict[str, Any], tally: Tally) -> None:
    outcome = _outcome(run / "run")
    different = [key for key in expected if not _equal(outcome[key], expected[key])]
    tally.differences += [f"{run.name}: {key}" for key in different]


def _equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


if __name__ == "__main__":
    sys.exit(main())
