"""The cross product of `key=a,b` overrides, each job a `umtrain fit` in its own process."""

import csv
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from umtrain.config import load_config, quoted, sweep_axes
from umtrain.console import Console, format_duration
from umtrain.errors import Interrupted, RunError
from umtrain.files import write_json, write_text
from umtrain.job import (
    Job,
    failed_record,
    finished,
    is_unfinished,
    record_after,
    record_stamp,
    set_aside,
)
from umtrain.processes import end_with_parent
from umtrain.report.plots_sweep import sweep_plot
from umtrain.report.record import RECORD_NAME, Record, figure
from umtrain.report.sweep_page import main_axis, write_sweep_page
from umtrain.report.tables import strategy_table, sweep_cells, sweep_table
from umtrain.signals import StopRequest
from umtrain.submission import LauncherConfig, Submitter, command_of_ranks, split_launcher

SWEEPS = Path("runs")
SUMMARY_NAME = "summary.json"
STAMPS = "stamps.json"
_LONGEST_NAME = 120
_PATIENCE_S = 10.0
_ROW_KEYS = ("axes", "status", "dataset", "res", "memory", "device", "reasons")
_COLUMNS = {
    "status": "status",
    "images_per_s_mean": "throughput.images_per_s.mean",
    "images_per_s_std": "throughput.images_per_s.std",
    "step_s_mean": "throughput.step_s.mean",
    "step_s_std": "throughput.step_s.std",
    "device_peak_bytes": "memory_use.device_peak_bytes",
    "rss_peak_bytes": "memory_use.rss_peak_bytes",
    "test_auc": "test.auc",
    "test_mae_mm": "test.mae_mm",
    "test_median_ae_mm": "test.median_ae_mm",
    "n_test": "data.n_test",
    "elapsed_s": "elapsed_s",
}


def sweep(overrides: list[str], console: Console) -> Path:
    """Run every job that has not finished yet; return the sweep's folder.

    A job that failed or ran out of memory is a row of the table, not an end. Finished jobs
    (ok or out of memory) of the same sweep are kept, unfinished ones go on from their last
    checkpoint. Raises ConfigError before the first job starts if any job's configuration is wrong.
    `launcher=` says where jobs run.
    """
    launcher, overrides = split_launcher(overrides)
    axes, fixed = sweep_axes(overrides)
    folder = _sweep_folder(axes, fixed)
    jobs = plan_jobs(axes, fixed, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"run_dir={folder}: cannot be made ({error.strerror})") from error
    console.say(f"sweep of {len(jobs)} jobs in {folder}")
    started_s = time.monotonic()
    run_all = _one_by_one if launcher.name == "local" else partial(_on_cluster, launcher, folder)
    found: dict[int, Record] = {}
    grace_s = max(job.config.signal_grace_s for job in jobs)
    with _Display(console, list(axes)) as display, StopRequest(grace_s):
        for position, record in run_all(jobs, display, console):
            found[position] = {**record, "axes": jobs[position].axes}
            records = [found[i] for i in sorted(found)]
            _write_summary(folder, list(axes), records)
            display.finished(records, found[position])
    records = [found[i] for i in sorted(found)]
    _show(folder, list(axes), records, console)
    console.say(f"took     {format_duration(time.monotonic() - started_s)}")
    console.say(f"summary  {folder / 'summary.csv'}")
    return folder


def _one_by_one(
    jobs: list[Job], display: "_Display", console: Console
) -> Iterator[tuple[int, Record]]:
    """Yield each job's position and record, run here in turn."""
    for position, job in enumerate(jobs):
        record = finished(job)
        _announce(position, jobs, console, "" if record is None else ": finished before, kept")
        yield position, _run_job(job, display) if record is None else record


def _on_cluster(
    launcher: LauncherConfig,
    folder: Path,
    jobs: list[Job],
    display: "_Display",
    console: Console,
) -> Iterator[tuple[int, Record]]:
    """Yield each job's position and record as it ends; all are submitted at once."""
    submitter = Submitter(launcher, folder)
    positions = {job.run_dir.name: position for position, job in enumerate(jobs)}
    commands: dict[str, list[str]] = {}
    stamps = _stamps_at_submission(folder)
    for name, position in positions.items():
        job = jobs[position]
        record = finished(job)
        if record is not None:
            _announce(position, jobs, console, ": finished before, kept")
        elif not submitter.is_queued(name):
            record = _make_room(job)
            stamps[name] = record_stamp(job)
        if record is not None:
            yield position, record
        else:
            commands[name] = _cluster_command(launcher, job)
    write_json(folder / STAMPS, stamps)
    try:
        for ended in submitter.run(commands, console.say):
            position = positions[ended.key]
            stamp_before = stamps.get(ended.key)
            yield position, record_after(jobs[position], stamp_before, ended.code, ended.reason)
    except KeyboardInterrupt:
        console.say("submitted jobs go on without the sweep; the same command follows them again")
        raise


def _cluster_command(launcher: LauncherConfig, job: Job) -> list[str]:
    # The job's own words come later and win.
    words = ["fit", f"signal_grace_s={launcher.step_grace_s}", *job.overrides]
    words.append(f"run_dir={quoted(str(job.run_dir.absolute()))}")
    return command_of_ranks(sys.executable, launcher, words)


def _stamps_at_submission(folder: Path) -> dict[str, int | None]:
    """Return the stamps that the jobs' records had as earlier sweeps submitted them, by name."""
    path = folder / STAMPS
    stamps: dict[str, int | None] = json.loads(path.read_text()) if path.exists() else {}
    return stamps


def _make_room(job: Job) -> Record | None:
    """Set aside what another job left in the folder; return the job's row if that fails."""
    try:
        if not is_unfinished(job):
            set_aside(job.run_dir)
    except RunError as error:
        return failed_record(job, str(error))
    return None


def _announce(position: int, jobs: list[Job], console: Console, what: str) -> None:
    title = ", ".join(f"{key}={value}" for key, value in jobs[position].axes.items())
    console.say(f"job {position + 1}/{len(jobs)}: {title}{what}")


def plan_jobs(axes: dict[str, list[str]], fixed: list[str], folder: Path) -> list[Job]:
    """Return the cross product of `axes`, every job's configuration checked."""
    jobs = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        overrides = [*fixed, *(f"{key}={value}" for key, value in point.items())]
        jobs.append(Job(point, overrides, folder / _job_name(point), load_config(overrides)))
    return jobs


def _job_name(point: dict[str, str]) -> str:
    """Return a folder name for a job, another one for every other point."""
    words = "_".join(f"{key}-{value}" for key, value in point.items())
    name = re.sub(r"[^\w.-]", "-", words)
    if name == words and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _sweep_folder(axes: dict[str, list[str]], fixed: list[str]) -> Path:
    given = [text for text in fixed if text.startswith("run_dir=")]
    for text in given:
        fixed.remove(text)
    run_dir = load_config(given).run_dir if given else None
    if run_dir is not None:
        return Path(run_dir).expanduser()
    identity = json.dumps([axes, sorted(fixed)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return SWEEPS / f"sweep-{'-'.join(key.split('.')[-1] for key in axes)}-{digest}"


def _run_job(job: Job, display: "_Display") -> Record:
    failure = _make_room(job)
    if failure is not None:
        return failure
    stamp_before = record_stamp(job)
    command = [sys.executable, "-m", "umtrain", "fit", *job.overrides]
    process = subprocess.Popen(
        [*command, f"run_dir={quoted(str(job.run_dir))}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=end_with_parent,
    )
    last_line = ""
    try:
        for line in _lines(process):
            last_line = line or last_line
            display.job_says(line)
        code = process.wait()
    except KeyboardInterrupt as error:
        _end(process, job.config.signal_grace_s, has_heard="SIGINT" in str(error))
        raise Interrupted(f"{error}; run the same command again to go on") from error
    return record_after(job, stamp_before, code, last_line)


def _end(process: "subprocess.Popen[str]", grace_s: float, has_heard: bool) -> None:
    """Wait for a job to save and end; one that a terminal has not interrupted with us is asked."""
    asked = [(process.terminate, _PATIENCE_S + grace_s), (process.kill, None)]
    for ask, patience_s in [(None, _PATIENCE_S), *asked] if has_heard else asked:
        if ask is not None:
            ask()
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()


def _write_summary(folder: Path, axes: list[str], records: list[Record]) -> None:
    write_json(folder / SUMMARY_NAME, records)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*axes, *_COLUMNS])
    for record in records:
        figures = [figure(record, key) for key in _COLUMNS.values()]
        writer.writerow([*record["axes"].values(), *figures])
    write_text(folder / "summary.csv", text.getvalue())


def _show(folder: Path, axes: list[str], records: list[Record], console: Console) -> None:
    console.show(sweep_table(records, axes))
    if set(axes) == {"res", "memory"}:
        console.show(strategy_table(records))
    for record in records:
        if record["status"] == "failed":
            console.say(f"failed   {record['axes']}: {record['reasons'].get('status')}")
    picture = sweep_plot(folder / "summary.png", records, main_axis(axes))
    console.say(f"picture  {picture}")
    console.say(f"report   {_write_page(folder, axes, records)}")


def is_sweep(folder: Path) -> bool:
    """Tell whether `folder` is a sweep's and not a run's."""
    return (folder / SUMMARY_NAME).is_file() and not (folder / RECORD_NAME).exists()


def rebuild_sweep(folder: Path) -> Path:
    """Draw a sweep's pictures and write its page again, from summary.json; return the page's path.

    Raises RunError if summary.json is not a list of records of one sweep.
    """
    path = folder / SUMMARY_NAME
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        axes = list(records[0]["axes"])
        whole = bool(axes) and all(
            list(record["axes"]) == axes and {*_ROW_KEYS} <= record.keys() for record in records
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not readable as the summary of a sweep ({error})") from error
    if not whole:
        raise RunError(
            f"{path}: not the summary of a sweep; every row needs {', '.join(_ROW_KEYS)}"
        )
    return _write_page(folder, axes, records)


def _write_page(folder: Path, axes: list[str], records: list[Record]) -> Path:
    return write_sweep_page(
        folder, records, axes, [folder / _job_name(record["axes"]) for record in records]
    )


class _Display:
    """The live table on a terminal; a line per finished job elsewhere."""

    def __init__(self, console: Console, axes: list[str]) -> None:
        self._console, self._axes = console, axes
        self._records: list[Record] = []
        self._live = Live(console=console.rich, auto_refresh=False, transient=True)

    def __enter__(self) -> "_Display":
        if self._console.rich.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def job_says(self, line: str) -> None:
        """Show a line of the running job."""
        if self._live.is_started:
            table = sweep_table(self._records, self._axes)
            self._live.update(Group(table, Text(line[: self._console.rich.width])), refresh=True)
        else:
            self._console.say(f"  {line}")

    def finished(self, records: list[Record], newest: Record) -> None:
        """Show the rows so far."""
        self._records = list(records)
        if self._live.is_started:
            self._live.update(sweep_table(self._records, self._axes), refresh=True)
        else:
            self._console.say("  " + "  ".join(sweep_cells(newest)))
