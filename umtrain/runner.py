"""The one runner: data, model, strategy, loop, record."""

import csv
import dataclasses
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, cast, get_args

import torch
import yaml
from rich.table import Table
from torch import nn

from umtrain import memory, tasks
from umtrain.checkpoint import BEST, FOLDER, load_checkpoint
from umtrain.config import RunConfig, config_from_dict, config_to_dict, run_identity
from umtrain.console import Console, format_duration
from umtrain.data.demo import demo_manifest, demo_spec
from umtrain.data.manifest import Kind, Split, read_manifest
from umtrain.device import device_name, resolve_device, resolve_precision
from umtrain.errors import ConfigError, OutOfMemoryError, RunError
from umtrain.files import write_text
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.base import Strategy
from umtrain.memory.grouping import group_rows, make_groups
from umtrain.memory.working_set import measure_working_sets
from umtrain.report import html, plots
from umtrain.report.record import Record, environment, read_record, write_record
from umtrain.report.tables import group_table, run_table
from umtrain.tasks import AnyManifest, Row, Task
from umtrain.training import Trainer, autocast, inference, input_dtype

RUNS = Path("runs")
PREDICTIONS = "predictions.csv"
CONFIG = "config.yaml"


def fit(config: RunConfig, console: Console) -> Path:
    """Train, validate each epoch, evaluate the test split; return the run directory.

    The record is written however the run ends: ok, oom, failed or interrupted. Raises
    UmtrainError for what the user can mend and OutOfMemoryError when memory ran out.
    """
    started_s = time.monotonic()
    recycle_large_buffers()
    device = resolve_device(config.device)
    config = dataclasses.replace(
        config, device=device.type, precision=resolve_precision(config.precision, device)
    )
    config, manifest = _with_manifest(config, console)
    task = tasks.create(config, manifest)
    run_dir = _create_run_dir(config)
    console.open_log(run_dir / "log.txt")
    record = _new_record("fit", task, device)
    try:
        with _outcome(record, run_dir, started_s):
            _describe(task, device, run_dir, console)
            _train(task, device, run_dir, record, console)
            _test(task, device, run_dir, record, console)
        _publish(run_dir, record, console)
    finally:
        console.close_log()
    return run_dir


def evaluate(run_dir: Path | None, split: Split, changes: dict[str, Any], console: Console) -> Path:
    """Evaluate the best checkpoint of a run (null: the newest) on `split`; update its record.

    `changes` replaces root keys (device, precision) and `dataset.` keys of the run's config.
    """
    run_dir = run_dir or newest_run()
    record = read_record(run_dir)
    config = _read_run_config(run_dir, changes)
    device = resolve_device(config.device)
    manifest = _read_manifest(config)
    task = tasks.create(config, manifest)
    if not manifest.split(split):
        raise ConfigError(f"split={split}: {manifest.path} has no rows of this split")
    console.say(f"evaluating {run_dir} on {len(manifest.split(split))} images of split {split}")
    _evaluate_split(task, split, device, run_dir, record, console)
    _publish(run_dir, record, console)
    return run_dir


def newest_run(runs: Path = RUNS) -> Path:
    """Return the run directory whose record is the newest. Raises RunError if there is none."""
    records = [*runs.glob("*/metrics.json"), *runs.glob("*/*/metrics.json")]
    if not records:
        raise RunError(
            f"no run found in {runs}/; train one with `umtrain fit`, or name it with run=DIR"
        )
    return max(records, key=lambda path: path.stat().st_mtime).parent


def _with_manifest(config: RunConfig, console: Console) -> tuple[RunConfig, AnyManifest]:
    dataset = config.dataset
    if dataset.manifest is None:
        path = _demo_manifest(dataset.name, config.res, console)
    else:
        path = Path(dataset.manifest).expanduser()
    config = dataclasses.replace(
        config, dataset=dataclasses.replace(dataset, manifest=str(path.resolve()))
    )
    manifest = _read_manifest(config)
    if not manifest.split("train"):
        raise ConfigError(f"{path}: no row has split=train; nothing to train on")
    return config, manifest


def _demo_manifest(name: str, res: int, console: Console) -> Path:
    kind = cast(Kind, name)
    spec = demo_spec(kind, res)
    with console.task(f"making {spec.n} files", spec.n) as bar:
        return demo_manifest(kind, res, console.say, lambda done, _: bar.update(done))


def _read_manifest(config: RunConfig) -> AnyManifest:
    dataset = config.dataset
    root = Path(dataset.root).expanduser() if dataset.root else None
    return read_manifest(Path(str(dataset.manifest)), cast(Kind, dataset.name), root)


def _create_run_dir(config: RunConfig) -> Path:
    if config.run_dir is not None:
        run_dir = Path(config.run_dir).expanduser()
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ConfigError(
                f"run_dir={run_dir} is not empty; name a new folder, or remove the old run first"
            )
    else:
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.dataset.name}-{config.model.name}-{config.res}"
        run_dir = RUNS / f"{name}-{config.memory.name}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / CONFIG, yaml.safe_dump(config_to_dict(config), sort_keys=False))
    except OSError as error:
        raise RunError(f"{run_dir}: cannot be written ({error.strerror})") from error
    return run_dir


def _read_run_config(run_dir: Path, changes: dict[str, Any]) -> RunConfig:
    path = run_dir / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{path}: not readable as a run's configuration ({error})") from error
    for key, value in changes.items():
        group, _, leaf = key.rpartition(".")
        (values[group] if group else values)[leaf] = value
    return config_from_dict(values)


def _new_record(command: str, task: Task, device: torch.device) -> Record:
    config, manifest = task.config, task.manifest
    return {
        "status": "failed",
        "command": command,
        **run_identity(config),
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
            **task.data_facts,
            "skipped": [],
        },
        "reasons": {},
    }


@contextmanager
def _outcome(record: Record, run_dir: Path, started_s: float) -> Iterator[None]:
    """Set the record's status by how the block ends, and write it in every case."""
    reason = None
    try:
        yield
        record["status"] = "ok"
    except OutOfMemoryError as error:
        record["status"], reason = "oom", str(error)
        raise
    except KeyboardInterrupt:
        record["status"], reason = "interrupted", "interrupted by the user"
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        record["elapsed_s"] = time.monotonic() - started_s
        if reason is not None:
            record["reasons"]["status"] = reason
            for section in ("throughput", "memory_use", "train", "val", "test"):
                if record[section] is None:
                    record["reasons"][section] = f"the run ended before it: {reason}"
        write_record(run_dir, record)


def _describe(task: Task, device: torch.device, run_dir: Path, console: Console) -> None:
    config, manifest = task.config, task.manifest
    counts = ", ".join(f"{len(manifest.split(s))} {s}" for s in get_args(Split))
    console.say(f"run      {run_dir}")
    facts = "".join(f", {key} {value}" for key, value in task.data_facts.items() if value)
    console.say(f"data     {manifest.path} ({counts}{facts})")
    console.say(
        f"model    {config.model.name}, res={config.res}, batch {config.batch_size}, "
        f"norm {config.model.norm}"
    )
    console.say(f"compute  {device_name(device)}, {config.precision}, memory={config.memory.name}")


def _train(
    task: Task, device: torch.device, run_dir: Path, record: Record, console: Console
) -> None:
    config = task.config
    torch.manual_seed(config.seed)
    pretrained = config.model.pretrained
    model = task.create_model(Path(pretrained).expanduser() if pretrained else None).to(device)
    options = {
        item.name: getattr(config.memory, item.name)
        for item in dataclasses.fields(config.memory)
        if item.name not in ("name", "show_groups")
    }
    if config.trace:
        options["trace"] = run_dir
    strategy = memory.create(config.memory.name, device=device.type, **options)
    try:
        if config.memory.show_groups:
            console.show(_groups(task, model, strategy, device))
        trainer = Trainer(task, model, strategy, device, run_dir, console)
        try:
            trainer.fit()
        finally:
            record["train"] = trainer.progress.train_figures()
            record["throughput"] = trainer.progress.throughput()
            if record["throughput"]["step_s"]["n"] == 0:
                why = f"{len(trainer.progress.steps)} steps, all of them warm-up"
                record["reasons"]["throughput.images_per_s.mean"] = why
            use = dataclasses.asdict(strategy.stats())
            reasons = use.pop("reasons")
            record["memory_use"] = use
            record["reasons"].update({f"memory_use.{key}": why for key, why in reasons.items()})
    finally:
        strategy.close()


def _groups(task: Task, model: nn.Module, strategy: Strategy, device: torch.device) -> Table:
    precision = task.config.precision
    with autocast(device, precision):
        measured = measure_working_sets(model, task.sample_input(device, input_dtype(precision)))
    return group_table(group_rows(make_groups(model, measured, strategy.options)))


def _test(
    task: Task, device: torch.device, run_dir: Path, record: Record, console: Console
) -> None:
    splits: tuple[Split, ...] = ("val", "test")
    for split in splits:
        if task.manifest.split(split):
            _evaluate_split(task, split, device, run_dir, record, console)
        else:
            record["reasons"][split] = f"the manifest has no rows of split {split}"


def _evaluate_split(
    task: Task, split: Split, device: torch.device, run_dir: Path, record: Record, console: Console
) -> None:
    model = task.create_model()
    model.load_state_dict(load_checkpoint(run_dir / FOLDER / BEST)["model"])
    loader = task.loader(split, training=False)
    rows, loss = inference(task, model.to(device), split, loader, console)
    record[split] = {"loss": loss, "n": len(rows), **task.metrics(rows)}
    _write_predictions(run_dir, task.fields, rows, split)


def _write_predictions(run_dir: Path, fields: tuple[str, ...], rows: list[Row], split: str) -> None:
    path = run_dir / PREDICTIONS
    kept = [row for row in read_predictions(run_dir) if row["split"] != split]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text(path, text.getvalue())


def read_predictions(run_dir: Path) -> list[Row]:
    """Return the rows of a run's predictions.csv as text values; none if it is not there yet."""
    path = run_dir / PREDICTIONS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _publish(run_dir: Path, record: Record, console: Console) -> None:
    write_record(run_dir, record)
    predictions = read_predictions(run_dir)
    pictures = plots.run_plots(run_dir, record, predictions)
    report = html.write_report(run_dir, record, pictures)
    console.show(run_table(record))
    elapsed = record.get("elapsed_s")
    if elapsed is not None:
        console.say(f"took     {format_duration(elapsed)}")
    console.say(f"report   {report}")
