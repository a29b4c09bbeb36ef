"""The one record of a run, metrics.json: every table, plot and report derives from it.

A figure that could not be had is null, with its reason in `reasons` under the same dotted key.
"""

import json
import math
import platform
import shlex
import statistics
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from umtrain.errors import RunError
from umtrain.files import write_json

RECORD_NAME = "metrics.json"
# Why the status of a run is what it is, from its start until it has ended.
UNDER_WAY = "the run is under way, or was killed"
STATUSES = ("ok", "oom", "failed", "interrupted")
_KEYS = (
    *("started_at_s", "dataset", "model", "res", "memory", "precision", "device", "seed"),
    *("throughput", "memory_use", "train", "val", "test", "environment", "data", "reasons"),
)
_PACKAGES = ("torch", "torchvision", "hydra-core", "openslide-python", "pydicom", "numpy", "monai")

Record = dict[str, Any]


def summarise(values: list[float]) -> dict[str, float | int | None]:
    """Return mean, sample standard deviation and count of `values`, null where undefined."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def throughput(step_s: list[float], images: list[int]) -> Record:
    """Return images/s and seconds a step over steps that each took `step_s` for `images`."""
    rates = [n / seconds for n, seconds in zip(images, step_s, strict=True)]
    return {"images_per_s": summarise(rates), "step_s": summarise(step_s)}


def environment(device_name: str) -> Record:
    """Return the versions, the device and the source revision that figures were had with."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("umtrain", *_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "device_name": device_name,
        "platform": platform.platform(),
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_record(run_dir: Path, record: Record) -> None:
    """Write `record` to the run's metrics.json; not-a-number becomes null."""
    write_json(run_dir / RECORD_NAME, _without_nan(record))


def read_record(run_dir: Path) -> Record:
    """Return the run's record. Raises RunError if there is none or it is damaged."""
    path = run_dir / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; is {run_dir} a run of umtrain fit?") from None
    except (OSError, ValueError) as error:
        raise _damaged(run_dir, f"not readable as a record ({error})") from error
    if not isinstance(record, dict) or record.get("status") not in STATUSES:
        raise _damaged(run_dir, f"not a record of a run: status is not one of {_names(STATUSES)}")
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise _damaged(run_dir, f"not a record of this version: {_names(missing)} missing")
    return record


def _damaged(run_dir: Path, why: str) -> RunError:
    return RunError(
        f"{run_dir / RECORD_NAME}: {why}; restore it from a copy, or have it written anew with: "
        f"umtrain fit resume={shlex.quote(str(run_dir))}"
    )


def _names(keys: Iterable[str]) -> str:
    return ", ".join(keys)


def figure(record: Record, key: str) -> Any:
    """Return the value at dotted `key`, or None where the record has none."""
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def throughput_unit(record: Record) -> str:
    """Return what throughput counts: images, or the patches that a patch-level network sees."""
    return str(figure(record, "throughput.unit") or "images")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
