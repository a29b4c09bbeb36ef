"""The one runner: data, model, strategy, loop, record."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from rich.table import Table
from torch import nn

from umtrain import memory, tasks, two_stage
from umtrain.cases import grad_cam_maps, grad_cams, remove_cases, write_cases
from umtrain.checkpoint import BEST, FOLDER, load_checkpoint, step_of, step_paths
from umtrain.clock import RunClock
from umtrain.config import RunConfig
from umtrain.console import Console, format_duration
from umtrain.data.demo import demo_manifest, demo_spec
from umtrain.data.labels import LabelledManifest, positive_class
from umtrain.data.manifest import Kind, Split, is_present, read_manifest
from umtrain.device import (
    device_name,
    has_bf16,
    naming_device_failures,
    resolve_device,
)
from umtrain.errors import ConfigError, DataError, Interrupted, RunError
from umtrain.lock import run_lock
from umtrain.logger import RunLogger, check_logger, create_logger
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.base import Strategy
from umtrain.memory.grouping import group_rows, make_groups
from umtrain.memory.working_set import measure_working_sets
from umtrain.optimization import N_STATES
from umtrain.parallel.scratch import run_dir_of_rank
from umtrain.parallel.world import alone, world
from umtrain.planning.host import Readers, check_run
from umtrain.planning.subject import Subject
from umtrain.precision import bf16_fault, choose_precision
from umtrain.randomness import seed_all
from umtrain.report import html
from umtrain.report.record import Record, read_record, write_record
from umtrain.report.tables import group_table, run_table
from umtrain.resume import Start, plan_start
from umtrain.run_dir import (
    choose_run_dir,
    make_run_dir,
    newest_run,
    read_predictions,
    read_run_config,
    write_config,
    write_predictions,
)
from umtrain.run_record import keep_earlier, new_record, note_training, outcome
from umtrain.signals import StopRequest
from umtrain.tasks import AnyManifest, Row, Task
from umtrain.training import Trainer, autocast, inference, input_dtype, ranks_of

_N_SHOWN = 20


def fit(config: RunConfig, console: Console) -> Path:
    """Train, validate each epoch, evaluate the test split; return the run directory.

    All ranks of a world run it; those but the first work in a scratch folder. The record is
    written however the run ends: ok, oom, failed or interrupted. Raises UmtrainError for what the
    user can mend and OutOfMemoryError when memory ran out.
    """
    clock = RunClock()
    check_logger(config.logger)
    device = resolve_device(config.device)
    recycle_large_buffers(device.type)
    config = _on(device, config, console)
    with (
        StopRequest(config.signal_grace_s) as stop,
        run_dir_of_rank(lambda: choose_run_dir(config)) as run_dir,
    ):
        # Of a run that goes on, images that are gone by now are left out as unreadable ones are.
        is_new = world().tell(not step_paths(run_dir / FOLDER))
        with world().main_first():
            config, manifest = _with_manifest(config, console, needs_all=is_new)
        task = tasks.create(config, manifest)
        make_run_dir(run_dir)
        with run_lock(run_dir), _how_to_go_on(run_dir):
            console.open_log(run_dir / "log.txt")
            try:
                _fit_in(run_dir, task, device, console, clock, stop)
            finally:
                console.close_log()
    return run_dir


def _fit_in(
    run_dir: Path,
    task: Task,
    device: torch.device,
    console: Console,
    clock: RunClock,
    stop: StopRequest,
) -> None:
    """Begin, go on with or finish the run whose directory this process holds."""
    config, is_main = task.config, world().is_main
    start = _agreed_start(run_dir, task, console)
    if start.is_over:
        console.say(f"{run_dir} is finished; nothing is left to do")
        if is_main:
            _publish(run_dir, read_record(run_dir), console)
        return
    write_config(run_dir, config)
    record = new_record("fit", task, device)
    if start.checkpoint:
        keep_earlier(record, run_dir, clock)
    logger = create_logger(config.logger if is_main else "none", run_dir, 1 + start.step)
    session = _Session(run_dir, device, console, logger, clock, stop, start)
    try:
        with outcome(record, run_dir, clock):
            _describe(task, device, run_dir, console)
            with naming_device_failures():
                _train(two_stage.network_task(task), session, record)
                if config.approach == two_stage.NAME:
                    _finish_two_stage(task, device, run_dir, record, console)
                else:
                    _test(task, device, run_dir, record, console)
        if is_main:
            _publish(run_dir, record, console)
            pictures = sorted([*run_dir.glob("*.png"), *run_dir.glob("cases/*.png")])
            logger.pictures(record["train"]["steps"], pictures)
    finally:
        logger.close()


def _agreed_start(run_dir: Path, task: Task, console: Console) -> Start:
    """Return how the first rank's run directory says that the session begins, on every rank."""
    start = Start()
    if world().is_main:
        start = plan_start(run_dir, task.config, task.manifest.sha256, console.say)
        if start.checkpoint:
            start = dataclasses.replace(start, checkpoint=start.checkpoint.absolute())
    return world().tell(start)


def _finish_two_stage(
    task: Task, device: torch.device, run_dir: Path, record: Record, console: Console
) -> None:
    """Fit the slide model and test; the first rank does it, the others are done."""
    if world().is_main:
        with alone():
            _fit_slide_model(task, device, run_dir, record, console)
            _test(task, device, run_dir, record, console)


@dataclass(frozen=True)
class _Session:
    """What one process brings to a run."""

    run_dir: Path
    device: torch.device
    console: Console
    logger: RunLogger
    clock: RunClock
    stop: StopRequest
    start: Start


@contextmanager
def _how_to_go_on(run_dir: Path) -> Iterator[None]:
    """Have an interruption say what to type next."""
    try:
        yield
    except KeyboardInterrupt as error:
        steps = step_paths(run_dir / FOLDER)
        saved = f"saved after step {step_of(steps[0])}" if steps else "nothing to save yet"
        command = f"umtrain fit resume={shlex.quote(str(run_dir))}"
        raise Interrupted(
            f"{str(error) or 'interrupted'}, {saved}; go on with: {command}"
        ) from error


def evaluate(run_dir: Path | None, split: Split, changes: dict[str, Any], console: Console) -> Path:
    """Evaluate the best checkpoint of a run (null: the newest) on `split`; update its record.

    `changes` replaces keys of the run's config: device, precision, dataset.workers, and
    dataset.manifest and dataset.root for data that has moved. Raises ConfigError if the manifest
    is another one: its figures would stand under the name of the one trained with.
    """
    run_dir = run_dir or newest_run()
    read_record(run_dir)  # a folder that is no run gets no lock
    with run_lock(run_dir) if world().is_main else nullcontext():
        _evaluate_in(run_dir, split, changes, console)
    return run_dir


def _evaluate_in(run_dir: Path, split: Split, changes: dict[str, Any], console: Console) -> None:
    """Evaluate the run whose directory this process holds."""
    record = read_record(run_dir)
    config = read_run_config(run_dir, changes)
    device = resolve_device(config.device)
    recycle_large_buffers(device.type)
    config = _on(device, config, console)
    manifest = _read_manifest(config)
    if manifest.sha256 != record["data"].get("manifest_sha256"):
        raise ConfigError(
            f"{manifest.path} is not the manifest that {run_dir} was trained with (its content "
            "differs); evaluate with the same rows, or train a run on the new ones"
        )
    task = tasks.create(config, manifest)
    task.skipped.restore(e for e in record["data"]["skipped"] if e["split"] != split)
    record["data"]["skipped"] = task.skipped.entries
    if not manifest.split(split):
        raise ConfigError(f"split={split}: {manifest.path} has no rows of this split")
    if config.approach == two_stage.NAME and not world().is_main:
        return  # maps of slides are made by the first rank alone
    console.say(f"evaluating {run_dir} on {len(manifest.split(split))} images of split {split}")
    with naming_device_failures():
        _evaluate_split(task, split, device, run_dir, record, console, config.cases)
    if world().is_main:
        _publish(run_dir, record, console)


def _on(device: torch.device, config: RunConfig, console: Console) -> RunConfig:
    """Return `config` with its device and its precision resolved; say why auto is not bf16."""
    native = has_bf16(device)
    precision = choose_precision(config, device.type, has_bf16=native)
    fault = bf16_fault(config, device.type)
    if native and fault is not None and config.precision == "auto":
        console.say(f"precision=auto takes fp32: {fault}")
    return dataclasses.replace(config, device=device.type, precision=precision)


def _with_manifest(
    config: RunConfig, console: Console, *, needs_all: bool
) -> tuple[RunConfig, AnyManifest]:
    """Return the configuration with its manifest, and that; `needs_all`: no file may be missing."""
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
    if needs_all:
        _check_files(manifest)
    if config.approach == two_stage.NAME:
        two_stage.check_masks(manifest)
    if manifest.kind in ("wsi", "ct"):
        # Kept with the run: another version of the rules must not turn its labels round.
        positive = positive_class(cast(LabelledManifest, manifest), dataset.positive)
        config = dataclasses.replace(
            config, dataset=dataclasses.replace(config.dataset, positive=positive)
        )
    return config, manifest


def _check_files(manifest: AnyManifest) -> None:
    missing = [record for record in manifest.records if not is_present(record)]
    if missing:
        shown = "\n".join(f"  row {record.row}: {record.path}" for record in missing[:_N_SHOWN])
        more = f"\n  and {len(missing) - _N_SHOWN} more" if len(missing) > _N_SHOWN else ""
        raise DataError(
            f"{manifest.path}: {len(missing)} of {len(manifest.records)} files are missing:\n"
            f"{shown}{more}\nPut them there, correct the paths or dataset.root; "
            f"`umtrain data check {manifest.path}` finds everything that is wrong"
        )


def _demo_manifest(name: str, res: int, console: Console) -> Path:
    kind = cast(Kind, name)
    spec = demo_spec(kind, res)
    with console.task(f"making {spec.n} files", spec.n) as bar:
        return demo_manifest(kind, res, console.say, lambda done, _: bar.update(done))


def _read_manifest(config: RunConfig) -> AnyManifest:
    dataset = config.dataset
    root = Path(dataset.root).expanduser() if dataset.root else None
    return read_manifest(Path(str(dataset.manifest)), cast(Kind, dataset.name), root)


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
    if config.approach == two_stage.NAME:
        console.say(
            f"approach two_stage: {config.dataset.patches_per_slide} patches a training slide and "
            "epoch, then a slide model"
        )
    console.say(f"compute  {device_name(device)}, {config.precision}, memory={config.memory.name}")


def _train(task: Task, session: _Session, record: Record) -> None:
    config, run_dir, console = task.config, session.run_dir, session.console
    device, logger, start = session.device, session.logger, session.start
    seed_all(config.seed)
    pretrained = config.model.pretrained
    model = task.create_model(Path(pretrained).expanduser() if pretrained else None).to(device)
    trace = run_dir if config.trace else None
    readers = _readers_of(task)
    chosen = _with_strategy(config, start.strategy)
    strategy = create_strategy(chosen, device, trace, readers.n_bytes)
    try:
        if config.memory.show_groups:
            console.show(_groups(task, model, strategy, device))
        _check_room(task, model, strategy, readers)
        with strategy.guard():
            draw = _overlays(task, model, device, run_dir, console, logger)
            trainer = Trainer(
                *(task, model, strategy, device, run_dir, console, logger, draw),
                clock=session.clock,
                stop=session.stop,
            )
            if start.checkpoint:
                trainer.restore(start.checkpoint)
                note_training(task, trainer, record)
        try:
            with strategy.guard():
                trainer.fit()
            peaks = world().collect(strategy.stats().rss_peak_bytes)
            record["parallel"]["rss_peak_bytes"] = peaks
        finally:
            trainer.ranks.close()
            note_training(task, trainer, record)
    finally:
        strategy.close()


def _with_strategy(config: RunConfig, before: str | None) -> RunConfig:
    """Let memory=auto be what it was before: Note: [What may change between sessions]."""
    if config.memory.name != "auto" or before is None:
        return config
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, name=before))


def _readers_of(task: Task) -> Readers:
    dataset, config = task.dataset("train", training=True), task.config
    batch_bytes = config.batch_size * dataset.sample_bytes
    return Readers(config.dataset.workers, batch_bytes, dataset.kept_bytes)


def _check_room(task: Task, model: nn.Module, strategy: Strategy, readers: Readers) -> None:
    """Refuse a run that surely has not the memory it needs; raises OutOfMemoryError."""
    config = task.config
    sample = task.sample_input(torch.device("meta"), input_dtype(config.precision))
    n_states = N_STATES[config.optim.name]
    subject = Subject(model, sample, config.precision, n_states=n_states)
    check_run(subject, strategy.name, strategy.options, readers)


def _overlays(
    task: Task,
    model: nn.Module,
    device: torch.device,
    run_dir: Path,
    console: Console,
    logger: RunLogger,
) -> Callable[[list[Row], int], None]:
    """Return what draws cases of a validation, under training, for a logger that shows pictures.

    Patches have no cases.
    """

    def draw(rows: list[Row], number: int) -> None:
        if logger.folder is None or task.config.approach == two_stage.NAME:
            return
        maps = _maps(task, model, "val", device, run_dir)
        remove_cases(logger.folder, "val")
        drawn = write_cases(task, "val", rows, logger.folder, console, maps, n_cases=1)
        logger.pictures(number, [logger.folder / case["picture"] for case in drawn])

    return draw


def _fit_slide_model(
    task: Task, device: torch.device, run_dir: Path, record: Record, console: Console
) -> None:
    patches = two_stage.network_task(task)
    model = _best_model(patches, device, run_dir)
    with _prepared(patches, model, device) as (network, _):
        fitted = two_stage.fit_slides(task, network, run_dir, console)
    record["train"]["slide_model"] = dataclasses.asdict(fitted)


def _best_model_of_all(task: Task, device: torch.device, run_dir: Path) -> nn.Module:
    """Return `_best_model` as the first rank reads it, on every rank."""
    here = world()
    model = _best_model(task, device, run_dir) if here.is_main else task.create_model().to(device)
    here.spread_weights(model)
    return model


def _best_model(task: Task, device: torch.device, run_dir: Path) -> nn.Module:
    """Return the network of the run's best checkpoint; raises RunError if there is none of it."""
    path = run_dir / FOLDER / BEST
    model = task.create_model()
    try:
        model.load_state_dict(load_checkpoint(path)["model"])
    except (KeyError, RuntimeError) as error:
        raise RunError(
            f"{path}: not a checkpoint of this run's {task.config.model.name}"
        ) from error
    return model.to(device)


@contextmanager
def _prepared(
    task: Task, model: nn.Module, device: torch.device
) -> Iterator[tuple[nn.Module, Strategy]]:
    """Yield `model` as the memory strategy evaluates it, and the strategy.

    Raises OutOfMemoryError, in the block too.
    """
    strategy = create_strategy(task.config, device, trace=None)
    try:
        ranks = ranks_of(task)
        ranks.tie_inference(strategy)
        with strategy.guard(), autocast(device, task.config.precision):
            sample = task.sample_input(device, input_dtype(task.config.precision))
            prepared = strategy.prepare_inference(model, ranks.band_of(sample))
        with strategy.guard():
            yield prepared, strategy
    finally:
        strategy.close()


def create_strategy(
    config: RunConfig, device: torch.device, trace: Path | None, readers_bytes: int = 0
) -> Strategy:
    """Return the configured memory strategy; `trace` is the folder of its timeline, if any.

    `readers_bytes` is what reader processes will take beside it.
    """
    options = {
        item.name: getattr(config.memory, item.name)
        for item in dataclasses.fields(config.memory)
        if item.name not in ("name", "show_groups")
    }
    options |= {"device": device.type, "trace": trace, "readers_bytes": readers_bytes}
    return memory.create(config.memory.name, **options)


def _groups(task: Task, model: nn.Module, strategy: Strategy, device: torch.device) -> Table:
    precision = task.config.precision
    with autocast(device, precision):
        measured = measure_working_sets(model, task.sample_input(device, input_dtype(precision)))
    return group_table(group_rows(make_groups(model, measured, strategy.options)))


def _test(
    task: Task, device: torch.device, run_dir: Path, record: Record, console: Console
) -> None:
    splits: tuple[Split, ...] = ("val", "test")
    present = [split for split in splits if task.manifest.split(split)]
    for split in splits:
        if split in present:
            n_cases = task.config.cases if split == present[-1] else 0
            _evaluate_split(task, split, device, run_dir, record, console, n_cases)
        else:
            record["reasons"][split] = f"the manifest has no rows of split {split}"


def _evaluate_split(
    task: Task,
    split: Split,
    device: torch.device,
    run_dir: Path,
    record: Record,
    console: Console,
    n_cases: int,
) -> None:
    network = two_stage.network_task(task)
    model = _best_model_of_all(network, device, run_dir)
    with _prepared(network, model, device) as (prepared, strategy):
        if task.config.approach == two_stage.NAME:
            rows, loss = two_stage.slide_rows(task, prepared, split, run_dir, console)
        else:
            loader = task.loader(split, training=False, share=ranks_of(task).share)
            rows, loss = inference(task, prepared, strategy, split, loader, console)
    if not world().is_main:
        return
    if not rows:
        record[split], record["reasons"][split] = None, f"no image of split {split} can be read"
        write_predictions(run_dir, task.fields, rows, split)
        return
    validation = record["val"] if split == "test" else None
    record[split] = {
        "loss": loss,
        "n": len(rows),
        "n_skipped": len(task.skipped.of_split(split)),
        **task.evidence(rows, validation),
        "precision": task.config.precision,
        "device": task.config.device,
        "cases": [],
    }
    record["reasons"].pop(split, None)
    write_predictions(run_dir, task.fields, rows, split)
    write_record(run_dir, record)  # the figures of these predictions, whatever becomes of the cases
    remove_cases(run_dir, split)
    if n_cases:
        maps = _maps(task, model, split, device, run_dir)
        threshold = record[split].get("threshold", 0.5)
        record[split]["cases"] = write_cases(
            task, split, rows, run_dir, console, maps, n_cases=n_cases, threshold=threshold
        )


def _maps(
    task: Task, model: nn.Module, split: Split, device: torch.device, run_dir: Path
) -> AbstractContextManager[Any]:
    """Return what shows where in an image the network found its reasons; see `write_cases`."""
    if task.config.approach == two_stage.NAME:
        return two_stage.cancer_maps(task, split, run_dir)
    make = grad_cams if task.config.dataset.name == "ct" else grad_cam_maps
    return make(task, model, split, lambda: create_strategy(task.config, device, trace=None))


def _publish(run_dir: Path, record: Record, console: Console) -> None:
    write_record(run_dir, record)
    report = html.write_run_page(run_dir, record, read_predictions(run_dir))
    console.show(run_table(record))
    elapsed = record.get("elapsed_s")
    if elapsed is not None:
        console.say(f"took     {format_duration(elapsed)}")
    console.say(f"report   {report}")
