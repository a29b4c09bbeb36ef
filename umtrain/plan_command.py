"""`umtrain plan`: what a run will take under each memory strategy, predicted without training."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from umtrain.config import RunConfig, sweep_axes
from umtrain.console import Console, format_duration
from umtrain.errors import ConfigError, OutOfMemoryError
from umtrain.files import write_json
from umtrain.memory.options import Options
from umtrain.parallel.gradients import BUCKET_BYTES
from umtrain.plan_subject import (
    Planned,
    Words,
    n_images,
    resolve_profile,
    split_words,
    with_rows,
)
from umtrain.planning.choice import choose
from umtrain.planning.data_parallel import Scaling, scale_out
from umtrain.planning.predict import Prediction, estimate, predict
from umtrain.planning.profile import Profile
from umtrain.planning.spread import Spread, spread_rows
from umtrain.planning.strategies import STRATEGIES, STREAM
from umtrain.report.plots_plan import plan_plot
from umtrain.units import format_bytes

RUNS = Path("runs")
PLAN_NAME, PICTURE_NAME = "plan.json", "plan.png"
# memory=auto tries all of them too, and a plan always says which it takes.
_ALL = ("all", "auto")
_NOTHING = "-"
_HEAP_TEXT = (
    "there is no page pool here (umtrain doctor): what strategies other than stream are said to "
    "hold includes holes of the heap, the most that were seen; memory.device_budget leaves none, "
    "and takes longer"
)
_COLUMNS = (
    "fits",
    "device, GiB",
    "host, GiB",
    "out, GiB",
    "in, GiB",
    "waits",
    "step",
    "epoch",
    "least, GiB",
)


@dataclass(frozen=True)
class Request:
    """What is to be planned: `words` for each of `sizes`, under each of `strategies`."""

    words: Words
    sizes: tuple[str, ...]
    strategies: tuple[str, ...]
    out: Path | None
    again: bool


def plan(words: list[str], console: Console) -> int:
    """Print predictions for `key=value` words; of several sizes, write them with a picture."""
    request = parse(words)
    # What is wrong with a word is said before anything is measured.
    checked = [request.words.checked(f"res={size}") for size in request.sizes]
    profile = profile_for(request, checked[0], console)
    console.say(
        f"predicted, not measured, for {profile.title}: device memory "
        f"{format_bytes(profile.device_bytes)}, host memory {format_bytes(profile.host_bytes)}"
    )
    rows: list[dict[str, Any]] = []
    scalings: dict[str, Any] = {}
    autos: dict[str, str] = {}
    for size in request.sizes:
        planned = request.words.planned(profile, f"res={size}")
        predictions = [_predict(planned, name) for name in request.strategies]
        epoch = _Epoch.of(planned)
        console.show(prediction_table(planned, predictions, epoch))
        for prediction in predictions:
            if prediction.why:
                console.say(f"{prediction.strategy}: {prediction.why}")
        if epoch.why:
            console.say(f"epoch: {epoch.why}")
        autos[size] = _auto(planned)
        console.say(autos[size])
        spreads = _spread(request, planned)
        if spreads:
            console.show(spread_table(spreads, planned))
        fastest = _fastest(predictions)
        scaling = _scaling(fastest, planned)
        if fastest is not None and scaling:
            console.show(scaling_table(scaling, fastest.strategy, planned))
        scalings[size] = {
            "strategy": None if fastest is None else fastest.strategy,
            "devices": [dataclasses.asdict(each) for each in scaling],
        }
        rows += [_row(planned, prediction, epoch) for prediction in predictions]
    _write(request, profile, rows, {"auto": autos, "scaling": scalings}, console)
    return 0


def profile_for(request: Request, config: RunConfig, console: Console) -> Profile:
    """Return the machine that is planned for; this one's spill file lies where `config` says."""
    spill_dir = config.memory.spill_dir
    profile = resolve_profile(
        request.words.device,
        console,
        again=request.again,
        spill_dir=Path(spill_dir).expanduser() if spill_dir else None,
    )
    is_budgeted = config.memory.device_budget is not None
    if profile.leaves_holes and not is_budgeted and request.strategies != (STREAM,):
        console.say(_HEAP_TEXT)
    return profile


def parse(words: list[str]) -> Request:
    """Tell the words of a plan from those of a run. Raises ConfigError for wrong ones."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key in ("memory", "out", "calibrate") and equals:
            own[key] = value
        else:
            rest.append(word)
    sizes: tuple[str, ...] = ()
    if any(word.startswith("res=") and "," in word for word in rest):
        axes, rest = sweep_axes(rest)
        if set(axes) != {"res"}:
            other = next(key for key in axes if key != "res")
            raise ConfigError(
                f"{other}: a plan takes several values of res only; plan it by itself"
            )
        sizes = tuple(axes["res"])
    memory = own.get("memory", "all")
    if memory not in (*STRATEGIES, *_ALL):
        raise ConfigError(f"memory={memory}: choose {', '.join((*_ALL, *STRATEGIES))}")
    split = split_words(rest, None if memory in _ALL else memory)
    strategies = tuple(_predictable(split)) if memory in _ALL else (memory,)
    again = own.get("calibrate", "false")
    if again not in ("true", "false"):
        raise ConfigError(f"calibrate={again}: expected true or false")
    size = sizes or (str(split.checked().res),)
    out = Path(own["out"]).expanduser() if "out" in own else None
    return Request(split, size, strategies, out, again == "true")


def _predictable(words: Words) -> list[str]:
    """Return all strategies; placement only where it is said what lies where."""
    has_layers = any(word.startswith("memory.cpu_layers=") for word in words.overrides)
    return [name for name in STRATEGIES if name != "placement" or has_layers]


def _predict(planned: Planned, strategy: str) -> Prediction:
    return predict(planned.subject, strategy, planned.profile, planned.options)


def _auto(planned: Planned) -> str:
    """Return the line that memory=auto would say."""
    try:
        choice = choose(planned.subject, planned.profile, planned.options)
        return f"memory=auto: {choice.sentence}"
    except OutOfMemoryError as error:
        return f"{error}"


@dataclass(frozen=True)
class _Epoch:
    """How many steps an epoch has, and what its validation takes, by an ordinary forward pass.

    None, and why, where there is no manifest to know it from.
    """

    n_steps: int | None
    validation_s: float
    why: str

    @classmethod
    def of(cls, planned: Planned) -> "_Epoch":
        n_of_split, why = n_images(planned.config)
        if n_of_split is None:
            return cls(None, 0.0, why)
        trace = planned.subject.trace()
        forward_s = sum(planned.subject.seconds(trace, planned.profile)[: trace.n_forward])
        batches = {
            split: math.ceil(n / planned.config.batch_size) for split, n in n_of_split.items()
        }
        return cls(batches["train"], batches["val"] * forward_s, "")

    def seconds(self, step_s: float | None) -> float | None:
        """Return the seconds of an epoch whose steps take `step_s`."""
        if step_s is None or self.n_steps is None:
            return None
        return step_s * self.n_steps + self.validation_s


def prediction_table(planned: Planned, predictions: list[Prediction], epoch: _Epoch) -> Table:
    """Return the predictions for one size, a strategy a row."""
    table = Table(title=f"predicted: {planned.title}")
    table.add_column("memory", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for p in predictions:
        cells = (
            p.strategy,
            "yes" if p.fits else "NO",
            *map(_gib, (p.device_peak_bytes, p.host_peak_bytes)),
            *map(_gib, (p.swapped_out_bytes, p.swapped_in_bytes)),
            *map(text_of_seconds, (p.copy_or_fault_s, p.step_s, epoch.seconds(p.step_s))),
            _gib(p.least_budget_bytes),
        )
        table.add_row(*map(Text, cells))
    return table


def spread_table(spreads: list[Spread], planned: Planned) -> Table:
    """Return what each device takes where rows are spread over several."""
    table = Table(title=f"predicted: {planned.title}, rows spread over devices, memory=stream")
    names = ("devices", "fits", "each, GiB", "host of a node, GiB", "each exchanges, GiB", "step")
    for name in names:
        table.add_column(name, justify="right")
    for s in spreads:
        cells = (
            str(s.n_devices),
            "yes" if s.fits else "NO",
            *map(_gib, (s.device_peak_bytes, s.host_peak_bytes, s.exchanged_bytes)),
            text_of_seconds(s.step_s),
        )
        table.add_row(*map(Text, cells))
    return table


def scaling_table(scaling: list[Scaling], strategy: str, planned: Planned) -> Table:
    """Return what many devices do, each with images of its own."""
    table = Table(title=f"predicted: {planned.title} on each device, memory={strategy}")
    names = ("devices", "fits", "host of a node, GiB", "each sends, GiB")
    for name in (*names, "waits", "step", "images/s", "efficiency"):
        table.add_column(name, justify="right")
    for s in scaling:
        cells = (
            str(s.n_devices),
            "yes" if s.fits else "NO",
            *map(_gib, (s.host_peak_bytes, s.exchanged_bytes)),
            *map(text_of_seconds, (s.waits_s, s.step_s)),
            _NOTHING if s.images_per_s is None else f"{s.images_per_s:.3g}",
            _NOTHING if s.efficiency is None else f"{s.efficiency:.2f}",
        )
        table.add_row(*map(Text, cells))
    return table


def _gib(n_bytes: float | None) -> str:
    return _NOTHING if n_bytes is None else f"{n_bytes / 2**30:.2f}"


def text_of_bytes(value: float | None) -> str:
    """Return bytes as people write them, a dash for None."""
    return _NOTHING if value is None else format_bytes(value)


def text_of_seconds(value: float | None) -> str:
    """Return a duration to three digits, a dash for None."""
    if value is None:
        return _NOTHING
    return f"{value:.3g} s" if value < 60 else format_duration(value)


def _spread(request: Request, planned: Planned) -> list[Spread]:
    if planned.profile.n_devices == 1 or "stream" not in request.strategies:
        return []
    _, n_rows, *_ = planned.input_shape
    return spread_rows(
        lambda n_rows: with_rows(planned, n_rows).subject,
        n_rows,
        planned.profile,
        planned.options,
    )


def _fastest(predictions: list[Prediction]) -> Prediction | None:
    fitting = [each for each in predictions if each.fits and each.step_s is not None]
    return min(fitting, key=lambda each: each.step_s or math.inf, default=None)


def _scaling(fastest: Prediction | None, planned: Planned) -> list[Scaling]:
    """Return what several devices do under parallel=data; nothing for a machine of one."""
    profile, config = planned.profile, planned.config
    if fastest is None or profile.n_devices == 1 or config.parallel != "data":
        return []

    def predict_with(profile: Profile, options: Options) -> Prediction:
        return estimate(planned.subject, fastest.strategy, profile, options)

    return scale_out(
        predict_with, planned.subject, config.batch_size, profile, planned.options, BUCKET_BYTES
    )


def _row(planned: Planned, prediction: Prediction, epoch: _Epoch) -> dict[str, Any]:
    config = planned.config
    return {
        "kind": "prediction",
        "model": config.model.name,
        "dataset": config.dataset.name,
        "res": config.res,
        "input_shape": list(planned.input_shape),
        "batch_size": config.batch_size,
        "precision": planned.precision,
        **dataclasses.asdict(prediction),
        "epoch_s": epoch.seconds(prediction.step_s),
        "epoch_why": epoch.why,
    }


def _write(
    request: Request,
    profile: Profile,
    rows: list[dict[str, Any]],
    more: dict[str, Any],
    console: Console,
) -> None:
    folder = request.out
    if folder is None:
        if len(request.sizes) == 1:
            return
        folder = RUNS / f"plan-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be made ({error.strerror})") from error
    device = dataclasses.asdict(profile)
    for key in ("convolution_samples", "pass_samples"):
        del device[key]
    document = {"kind": "prediction", "profile": device, **more, "rows": rows}
    write_json(folder / PLAN_NAME, document)
    title = f"predicted for {profile.title}"
    plan_plot(folder / PICTURE_NAME, rows, title)
    console.say(f"plan     {folder / PLAN_NAME}")
    console.say(f"picture  {folder / PICTURE_NAME}")
