"""A job of a sweep, and what an earlier sweep left in its folder."""

import hashlib
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from umtrain.config import RunConfig, config_to_dict, run_identity
from umtrain.errors import RunError, UmtrainError
from umtrain.lock import move_run
from umtrain.report.record import RECORD_NAME, UNDER_WAY, Record, read_record
from umtrain.run_dir import read_run_config

if TYPE_CHECKING:
    from umtrain.data.manifest import Kind

_SETTLED = ("ok", "oom")
# What leaves the choice to the run, whose config.yaml then has what it chose or was resumed from.
_LEFT_TO_THE_RUN = (
    *(("device", "auto"), ("precision", "auto")),
    *(("resume", "auto"), ("dataset.positive", None)),
)
# The content of a manifest is compared, not its place; the others change nothing that a run gives.
_NOT_COMPARED = {"run_dir", "signal_grace_s", "dataset.manifest"}


@dataclass(frozen=True)
class Job:
    """One point of the cross product."""

    axes: dict[str, str]
    overrides: list[str]
    run_dir: Path
    config: RunConfig


def finished(job: Job) -> Record | None:
    """Return the record of an earlier run of the same job on the same data, if it is settled."""
    record = _record(job)
    is_settled = record is not None and record["status"] in _SETTLED
    return record if is_settled and _is_same(job, record) else None


def is_unfinished(job: Job) -> bool:
    """Tell whether what is in the job's folder is this very job, to be gone on with."""
    try:
        return _is_same(job, read_record(job.run_dir) if _has_record(job) else None)
    except UmtrainError:
        return False


def set_aside(run_dir: Path) -> None:
    """Move what another job left out of the way; nothing is deleted.

    Raises RunError if a process is at work in it.
    """
    if not run_dir.exists():
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.unfinished-{number}")).exists():
        number += 1
    move_run(run_dir, aside)


def record_stamp(job: Job) -> int | None:
    """Return what changes when the job's record is written; None if there is none."""
    return (job.run_dir / RECORD_NAME).stat().st_mtime_ns if _has_record(job) else None


def record_after(job: Job, stamp_before: int | None, code: int | None, last_line: str) -> Record:
    """Return the row of a job that has ended with `code`, None if a cluster lost it.

    It is the job's record, unless it was killed, or failed and its record is as it was before it
    started or was never finished: then one that says how it ended.
    """
    is_killed = code is not None and code < 0
    if is_killed or (code != 0 and record_stamp(job) == stamp_before):
        return _lost_record(job, code, last_line)
    try:
        record = read_record(job.run_dir)
    except RunError:
        return _lost_record(job, code, last_line)
    is_whole = record["reasons"].get("status") != UNDER_WAY
    return record if is_whole else _lost_record(job, code, last_line)


def failed_record(job: Job, why: str) -> Record:
    """Return the row of a job that has no record of its own."""
    return {
        "status": "failed",
        "command": "fit",
        **run_identity(job.config),
        "reasons": {"status": why},
    }


def _lost_record(job: Job, code: int | None, last_line: str) -> Record:
    if code is None:
        ended = "the cluster"
    else:
        ended = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    return failed_record(job, f"ended by {ended} before it wrote a record: {last_line}")


def _has_record(job: Job) -> bool:
    return (job.run_dir / RECORD_NAME).exists()


def _record(job: Job) -> Record | None:
    try:
        return read_record(job.run_dir) if _has_record(job) else None
    except UmtrainError:
        return None


def _is_same(job: Job, record: Record | None) -> bool:
    """Tell whether the run in the job's folder, with its record, is what the job asks for."""
    try:
        before = config_to_dict(read_run_config(job.run_dir, {}))
    except UmtrainError:
        return False
    return _same_choices(config_to_dict(job.config), before) and _same_data(job, before, record)


def _same_choices(wanted: dict[str, Any], before: dict[str, Any], prefix: str = "") -> bool:
    return all(
        _same_choices(value, before[name], f"{name}.")
        if isinstance(value, dict)
        else value == before[name]
        or (key := prefix + name) in _NOT_COMPARED
        or (key, value) in _LEFT_TO_THE_RUN
        for name, value in wanted.items()
    )


def _same_data(job: Job, before: dict[str, Any], record: Record | None) -> bool:
    if job.config.dataset.manifest is None:
        return _is_demo(job, Path(before["dataset"]["manifest"] or ""))
    if record is None:
        return True
    try:
        content = Path(job.config.dataset.manifest).expanduser().read_bytes()
    except OSError:
        return False
    return bool(hashlib.sha256(content).hexdigest() == record["data"].get("manifest_sha256"))


def _is_demo(job: Job, manifest: Path) -> bool:
    """Tell whether a run's manifest is the demo data that the job would take, in any cache."""
    from umtrain.data.demo import demo_spec

    spec = demo_spec(cast("Kind", job.config.dataset.name), job.config.res)
    return manifest.parent.name == spec.folder_name
