"""A run directory: made once, gone on with, read back by `eval` and `report`."""

import csv
import io
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from umtrain.checkpoint import BEST, FOLDER
from umtrain.config import (
    GROUPS,
    RESUME_WORDS,
    RunConfig,
    config_from_dict,
    config_to_dict,
    override_values,
)
from umtrain.errors import ConfigError, RunError, UmtrainError
from umtrain.files import write_text
from umtrain.report.record import RECORD_NAME, read_record

RUNS = Path("runs")
PREDICTIONS = "predictions.csv"
CONFIG = "config.yaml"

Row = dict[str, Any]


def choose_run_dir(config: RunConfig) -> Path:
    """Return the folder that the run has or will have.

    Raises ConfigError if there is something in it that this run cannot go on with.
    """
    if config.resume not in RESUME_WORDS:
        return _resumed_dir(config)
    if config.run_dir is None:
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        approach = "" if config.approach == "no_fuss" else f"-{config.approach}"
        name = f"{stamp}-{config.dataset.name}{approach}-{config.model.name}-{config.res}"
        return RUNS / f"{name}-{config.memory.name}-{os.getpid()}"
    run_dir = Path(config.run_dir).expanduser()
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} is a file; name a folder")
    if run_dir.exists() and any(run_dir.iterdir()):
        if config.resume == "never":
            raise ConfigError(
                f"run_dir={run_dir} is not empty; name a new folder, or go on with the run in it "
                "with resume=auto"
            )
        if not (run_dir / CONFIG).is_file():
            raise ConfigError(f"run_dir={run_dir} is not empty, and no run; name a new folder")
    return run_dir


def checkpoint_of(config: RunConfig) -> Path | None:
    """Return the checkpoint that resume= names; None if it names a run, or nothing."""
    path = Path(config.resume).expanduser()
    return path if config.resume not in RESUME_WORDS and path.is_file() else None


def continued_config(overrides: list[str]) -> RunConfig:
    """Return the configuration of the run that `resume=PATH` among `overrides` names.

    The other overrides replace its values. Raises ConfigError or RunError.
    """
    changes: dict[str, Any] = override_values(overrides)
    run_dir = _run_of(Path(str(changes["resume"])).expanduser())
    for group in GROUPS:
        if group in changes:
            changes[f"{group}.name"] = changes.pop(group)
    return read_run_config(run_dir, changes)


def _resumed_dir(config: RunConfig) -> Path:
    run_dir = _run_of(Path(config.resume).expanduser())
    named = Path(config.run_dir).expanduser() if config.run_dir else run_dir
    if named.resolve() != run_dir.resolve():
        raise ConfigError(
            f"resume={config.resume} goes on in {run_dir}, not in run_dir={config.run_dir}; "
            "leave run_dir out"
        )
    return run_dir


def _run_of(path: Path) -> Path:
    """Return the run directory that is, or whose checkpoint is, at `path`."""
    run_dir = path.parent.parent if path.is_file() else path
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(
            f"resume={path}: no run there; name a run directory, one of its checkpoints, auto or "
            "never"
        )
    return run_dir


def make_run_dir(run_dir: Path) -> None:
    """Make the folder if it is not there. Raises RunError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{run_dir}: cannot be made ({error.strerror}); name a folder that can, with run_dir="
        ) from error


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the run's config.yaml."""
    try:
        write_text(run_dir / CONFIG, yaml.safe_dump(config_to_dict(config), sort_keys=False))
    except OSError as error:
        raise RunError(f"{run_dir}: cannot be written ({error.strerror})") from error


def read_run_config(run_dir: Path, changes: dict[str, Any]) -> RunConfig:
    """Return the configuration a run was made with, `changes` (dotted keys) applied.

    Raises RunError if config.yaml is missing or damaged.
    """
    path = run_dir / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it holds no keys")
        for key, value in changes.items():
            group, _, leaf = key.rpartition(".")
            (values[group] if group else values)[leaf] = value
        return config_from_dict(values)
    except UmtrainError:
        raise
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: not readable as a run's configuration ({error})") from error
    except yaml.YAMLError as error:
        raise RunError(
            f"{path}: not readable as a run's configuration: it must hold plain values, nothing "
            f"that makes objects ({type(error).__name__}); restore the file"
        ) from error


def newest_run(runs: Path = RUNS) -> Path:
    """Return the run that started last and has a checkpoint. Raises RunError if there is none."""
    started: dict[Path, float] = {}
    for path in (*runs.glob(f"*/{RECORD_NAME}"), *runs.glob(f"*/*/{RECORD_NAME}")):
        if (path.parent / FOLDER / BEST).exists():
            started[path.parent] = float(read_record(path.parent)["started_at_s"])
    if not started:
        raise RunError(
            f"no run found in {runs}/; train one with `umtrain fit`, or name it with run=DIR"
        )
    return max(started, key=lambda run_dir: started[run_dir])


def read_predictions(run_dir: Path) -> list[Row]:
    """Return the rows of a run's predictions.csv as text values; none if it is not there yet."""
    path = run_dir / PREDICTIONS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_predictions(run_dir: Path, fields: tuple[str, ...], rows: list[Row], split: str) -> None:
    """Write the rows of `split`, those of other splits kept."""
    kept = [row for row in read_predictions(run_dir) if row.get("split") != split]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text(run_dir / PREDICTIONS, text.getvalue())
