"""Trains for hours with kills, spilling and a live sweep, and looks for what leaks.

    python scripts/soak.py --minutes 120 --picture soak.png

Three things run side by side on small synthetic slides. `steady` is one process that trains all
the time, its saved tensors in a spill file (memory=lms): its resident memory, descriptors and child
processes are sampled. `killed` is a run (memory=um_group_prefetch, a reader process) that is killed
or interrupted every few seconds to a minute and started again with the same command; once it is
over, the next one begins. `sweep` is a sweep over memory strategies, run again and again, and
killed now and then too. At the end, what is left of processes, in /dev/shm, in the spill folder and
in the temporary folder is counted.

The slope of `steady`'s memory, in MiB/h with its 95% interval, is that of a line through all
samples after the first tenth. Training keeps 200 bytes or so of every step for its curves: with n
steps an hour that is a slope of n/5000 MiB/h that is meant.
Prints one line of JSON; the exit code is 1 if anything was left behind or a command failed.
"""

import argparse
import contextlib
import getpass
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats

MIB = 2**20
INTERVAL_S = 2.0
# The user's one cache of torch, which importing it makes.
TORCHS = f"tmp/torchinductor_{getpass.getuser()}"
SMALL = ("dataset=wsi", "precision=fp32", "device=cpu", "cases=0", "optim=sgd")
COMMANDS = {
    "steady": (
        *("fit", *SMALL, "res=128", "memory=lms", "epochs=1000000", "dataset.workers=1"),
        *("run_dir=steady", "checkpoint_minutes=1"),
    ),
    "killed": (
        *("fit", *SMALL, "res=192", "memory=um_group_prefetch", "memory.device_budget=700MiB"),
        *("epochs=12", "dataset.workers=1", "run_dir=killed", "checkpoint_minutes=0.05"),
    ),
    "sweep": (
        *("sweep", *SMALL, "memory=vanilla,lms,um", "res=64", "epochs=2", "dataset.workers=0"),
        "run_dir=sweep",
    ),
}
KILLS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class Findings:
    """What was seen."""

    kills: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[tuple[float, float, float, int, int]] = field(default_factory=list)


class Command:
    """A command that is started again whenever it is down, and killed at random instants."""

    def __init__(self, name: str, folder: Path, findings: Findings, mean_life_s: float) -> None:
        self._name, self._folder, self._findings = name, folder, findings
        self._mean_life_s = mean_life_s
        self._rng = random.Random(name)
        self.sessions: list[int] = []
        self._start()

    def tend(self) -> None:
        """Kill it if its time has come; start it anew if it is down."""
        code = self.process.poll()
        if code is None:
            if time.monotonic() > self._dies_at_s:
                self._kill()
            return
        self._note_end(code)
        self._start()

    def end(self) -> None:
        """Ask it to end, and wait."""
        if self.process.poll() is None:
            self._send(signal.SIGTERM)
        self._note_end(self.process.wait(120))

    def _start(self) -> None:
        with (self._folder / f"{self._name}.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "umtrain", *_words(self._name, self._folder)],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(self._folder),
            )
        self.sessions.append(self.process.pid)
        self._sent: signal.Signals | None = None
        life_s = self._rng.expovariate(1 / self._mean_life_s) if self._mean_life_s else 1e9
        # Before that Python imports, and nothing has been touched.
        self._dies_at_s = time.monotonic() + 5 + life_s

    def _kill(self) -> None:
        number = self._rng.choice(KILLS)
        self._findings.kills[number.name] += 1
        self._send(number)
        self._note_end(self.process.wait(120))
        self._start()

    def _send(self, number: signal.Signals) -> None:
        self._sent = number
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def _note_end(self, code: int) -> None:
        self._findings.ended[f"{self._name}: {code}"] += 1
        # Before it listens, a signal ends a process as the system does.
        asked = () if self._sent is None else (130, -self._sent)
        if code not in (0, *asked):
            after = "no signal" if self._sent is None else self._sent.name
            self._findings.failures.append(f"{self._name} ended with {code} after {after}")
        if code == 0:
            shutil.rmtree(self._folder / self._name, ignore_errors=True)


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    shared_memory = _entries(Path("/dev/shm"))
    try:
        findings, sessions = soak(folder, 60 * options.minutes)
        left = _left_behind(folder, sessions, shared_memory)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    figures = _figures(findings, left, options.minutes)
    _draw(options.picture, findings)
    print(json.dumps(figures))
    return int(bool(left or findings.failures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--picture", type=Path, default=Path("soak.png"))
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    return parser.parse_args()


def soak(folder: Path, length_s: float) -> tuple[Findings, set[int]]:
    """Run all three for `length_s`; return what was seen, and the sessions' ids."""
    from umtrain.data.synthetic.slides import make_slides

    for name in ("slides", "spill", "tmp"):
        (folder / name).mkdir()
    make_slides(folder / "slides", 12, 512, 0, None, 1)
    findings = Findings()
    commands = {
        "steady": Command("steady", folder, findings, 0),
        "killed": Command("killed", folder, findings, 20),
        "sweep": Command("sweep", folder, findings, 60),
    }
    start_s = time.monotonic()
    try:
        while time.monotonic() - start_s < length_s:
            time.sleep(INTERVAL_S)
            for command in commands.values():
                command.tend()
            _sample(commands["steady"].process.pid, start_s, findings)
    finally:
        for command in commands.values():
            command.end()
    return findings, {pid for command in commands.values() for pid in command.sessions}


def _words(name: str, folder: Path) -> list[str]:
    words = [*COMMANDS[name], f"dataset.manifest={folder / 'slides' / 'manifest.csv'}"]
    return [*words, f"memory.spill_dir={folder / 'spill'}"]


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TMPDIR": str(folder / "tmp"),
    }


def _sample(pid: int, start_s: float, findings: Findings) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        memory = process.memory_info()
        findings.samples.append(
            (
                (time.monotonic() - start_s) / 3600,
                memory.rss / MIB,
                (memory.rss - memory.shared) / MIB,
                process.num_fds(),
                len(process.children(recursive=True)),
            )
        )


def _entries(folder: Path) -> set[str]:
    return {str(path) for path in folder.iterdir()} if folder.exists() else set()


def _left_behind(folder: Path, sessions: set[int], shared_memory: set[str]) -> list[str]:
    """Return what there still is, once everything has had 30 s to end."""
    deadline_s = time.monotonic() + 30
    while (alive := _alive(sessions)) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    left = [f"process {name}" for name in alive]
    left += sorted(_entries(folder / "spill") | _entries(folder / "tmp") - {str(folder / TORCHS)})
    left += sorted(_entries(Path("/dev/shm")) - shared_memory)
    left += [str(path) for path in (folder / "steady").rglob(".*")]
    return left


def _alive(sessions: set[int]) -> list[str]:
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return alive


def _figures(findings: Findings, left: list[str], minutes: float) -> dict[str, Any]:
    samples = _settled(findings)
    return {
        "minutes": minutes,
        "kills": findings.kills.total(),
        "by_signal": dict(findings.kills),
        "ended": dict(findings.ended),
        "failures": findings.failures,
        "left_behind": left,
        "rss": _slope(samples, 1),
        "private": _slope(samples, 2),
        "descriptors": _range(samples, 3),
        "children": _range(samples, 4),
        "n_samples": len(samples),
    }


def _settled(findings: Findings) -> np.ndarray[Any, np.dtype[np.float64]]:
    samples = np.array(findings.samples, dtype=np.float64)
    return samples[len(samples) // 10 :]


def _slope(samples: np.ndarray[Any, np.dtype[np.float64]], column: int) -> dict[str, float]:
    fit = stats.linregress(samples[:, 0], samples[:, column])
    half = float(stats.t.ppf(0.975, len(samples) - 2) * fit.stderr)
    return {
        "mean_mib": round(float(samples[:, column].mean()), 1),
        "slope_mib_per_h": round(float(fit.slope), 2),
        "slope_ci_mib_per_h": [
            round(float(fit.slope) - half, 2),
            round(float(fit.slope) + half, 2),
        ],
    }


def _range(samples: np.ndarray[Any, np.dtype[np.float64]], column: int) -> list[int]:
    return [int(samples[:, column].min()), int(samples[:, column].max())]


def _draw(path: Path, findings: Findings) -> None:
    from matplotlib.figure import Figure

    samples = np.array(findings.samples, dtype=np.float64)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    memory, counts = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    memory.plot(60 * samples[:, 0], samples[:, 1], label="resident")
    memory.plot(60 * samples[:, 0], samples[:, 2], label="resident, of this process alone")
    memory.set_ylabel("MiB")
    memory.set_ylim(bottom=0)
    memory.set_title(
        f"A training process that spills, beside {findings.kills.total()} kills of others"
    )
    counts.plot(60 * samples[:, 0], samples[:, 3], label="open descriptors")
    counts.plot(60 * samples[:, 0], samples[:, 4], label="child processes")
    counts.set_xlabel("minutes")
    counts.set_ylim(bottom=0)
    for axes in (memory, counts):
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
