"""The record of a run: begun, kept up, and closed however the run ends."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

import torch

from umtrain import two_stage
from umtrain.clock import RunClock
from umtrain.config import run_identity
from umtrain.data.manifest import Split
from umtrain.device import device_name
from umtrain.errors import OutOfMemoryError, RunError
from umtrain.parallel.ranks import world_facts
from umtrain.report.record import UNDER_WAY, Record, environment, read_record, write_record
from umtrain.tasks import AnyManifest, Task
from umtrain.training import Trainer

_OF_TRAINING = ("throughput", "memory_use", "train")


def new_record(command: str, task: Task, device: torch.device) -> Record:
    """Return the record of a run that begins; what it lacks is null."""
    config, manifest = task.config, task.manifest
    return {
        "status": "interrupted",
        "command": command,
        "started_at_s": time.time(),
        **run_identity(config),
        "parallel": world_facts(config),
        "annotation": two_stage.annotation(config, manifest),
        "throughput": None,
        "memory_use": None,
        "train": None,
        "val": None,
        "test": None,
        "environment": environment(device_name(device)),
        "data": {
            "manifest": config.dataset.manifest,
            "manifest_sha256": manifest.sha256,
            **{f"n_{split}": len(manifest.split(split)) for split in get_args(Split)},
            "n_patients": {split: _n_patients(manifest, split) for split in get_args(Split)},
            **_scale(manifest),
            **task.data_facts,
            "skipped": task.skipped.entries,
        },
        "reasons": {},
    }


def _n_patients(manifest: AnyManifest, split: Split) -> int:
    return len({image.patient_id for image in manifest.split(split)})


def _scale(manifest: AnyManifest) -> Record:
    """Return the range of sizes of a pixel that the manifest states, µm or mm, and how many not."""
    if manifest.kind == "ct":
        return {}  # each file states its own
    key = "mpp" if manifest.kind == "wsi" else "mm_per_px"
    values = [getattr(record, key) for record in manifest.records]
    stated = [value for value in values if value is not None]
    limits = {"min": min(stated, default=None), "max": max(stated, default=None)}
    return {key: {**limits, "n_unstated": len(values) - len(stated)}}


def keep_earlier(record: Record, run_dir: Path, clock: RunClock) -> None:
    """Keep what earlier sessions noted of the training, until this one has their state."""
    with suppress(RunError):
        earlier = read_record(run_dir)
        clock.go_on(earlier["started_at_s"], earlier.get("elapsed_s") or 0.0)
        record |= {section: earlier[section] for section in _OF_TRAINING}
        reasons = earlier["reasons"].items()
        record["reasons"] |= {key: why for key, why in reasons if _is_of_training(key)}


@contextmanager
def outcome(record: Record, run_dir: Path, clock: RunClock) -> Iterator[None]:
    """Write the record as that of a run under way, then, in every case, how the block ended."""
    status, reason = "failed", None
    try:
        _set_status(record, "interrupted", UNDER_WAY, clock)
        write_record(run_dir, record)
        yield
        status = "ok"
    except OutOfMemoryError as error:
        status, reason = "oom", str(error)
        raise
    except KeyboardInterrupt as error:
        status, reason = "interrupted", str(error) or "interrupted by the user"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        _set_status(record, status, reason, clock)
        _write_last_record(run_dir, record, is_well=reason is None)


def _set_status(record: Record, status: str, reason: str | None, clock: RunClock) -> None:
    """Set how the run stands, and with `reason` why it lacks the sections that it lacks."""
    record["status"] = status
    record["started_at_s"], record["elapsed_s"] = clock.started_at_s, clock.elapsed_s
    reasons = {key: why for key, why in record["reasons"].items() if why != UNDER_WAY}
    if reason is not None:
        reasons["status"] = reason
        lacks = reason if reason == UNDER_WAY else f"the run ended before it: {reason}"
        for section in (*_OF_TRAINING, "val", "test"):
            if record[section] is None:
                reasons.setdefault(section, lacks)
    record["reasons"] = reasons


def _write_last_record(run_dir: Path, record: Record, *, is_well: bool) -> None:
    try:
        write_record(run_dir, record)
    except OSError:
        # What ended the run, such as a full disk, has to be seen, not that its record failed too.
        if is_well:
            raise


def note_training(task: Task, trainer: Trainer, record: Record) -> None:
    """Set the record's sections on training, memory and throughput."""
    progress = trainer.progress
    reasons = record["reasons"].items()
    record["reasons"] = {key: why for key, why in reasons if not _is_of_training(key)}
    record["train"] = progress.train_figures()
    unit = "patches" if task.config.approach == two_stage.NAME else "images"
    record["throughput"] = {**progress.throughput(), "unit": unit}
    if record["throughput"]["step_s"]["n"] == 0:
        why = f"{len(progress.steps)} steps, all of them warm-up"
        record["reasons"]["throughput.images_per_s.mean"] = why
    record["memory_use"] = trainer.memory_use()
    lacks = record["memory_use"].pop("reasons")
    record["reasons"].update({f"memory_use.{key}": why for key, why in lacks.items()})


def _is_of_training(key: str) -> bool:
    return key.partition(".")[0] in _OF_TRAINING
