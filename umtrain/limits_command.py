"""`umtrain limits`: the largest res or batch that fits, by strategy, predicted or tried out."""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from umtrain.config import (
    CHOICES,
    LEAST_RES,
    MOST_PIXELS,
    RES_MULTIPLE_PX,
    RunConfig,
    check_config,
)
from umtrain.console import Console
from umtrain.device import device_name, resolve_device
from umtrain.errors import ConfigError, RunError
from umtrain.files import write_json
from umtrain.plan_command import (
    RUNS,
    Request,
    parse,
    profile_for,
    text_of_bytes,
    text_of_seconds,
)
from umtrain.plan_subject import Planned, resized
from umtrain.planning.limits import Secant, largest
from umtrain.planning.predict import Prediction, estimate
from umtrain.planning.profile import Profile
from umtrain.planning.strategies import STRATEGIES, Setting
from umtrain.report.plots_plan import limits_plot
from umtrain.trial import run_trial

LIMITS_NAME, PICTURE_NAME = "limits.json", "limits.png"
_MOST_RES, _MOST_BATCH = 2**18, 2**14
# Radiographs come in these sizes; where any would do, predictions are not as sure as a pixel.
_STEP_PX = {"wsi": 32, "spine": RES_MULTIPLE_PX, "ct": 4}
_N_STEPS = 2  # the second holds the optimizer's state too
_OWN = ("of", "measure")
_OTHER = {"res": "batch_size", "batch_size": "res"}


@dataclass(frozen=True)
class Axis:
    """What is made as large as it goes: `key`, from `least` in steps of `step` up to `most`.

    Memory grows with the `power` of it.
    """

    key: str
    least: int
    step: int
    most: int
    power: int

    @classmethod
    def of(cls, key: str, config: RunConfig) -> "Axis":
        """Return the axis `key` of what `config` trains on."""
        if key == "batch_size":
            return cls(key, 1, 1, min(_MOST_BATCH, MOST_PIXELS // config.res**2), power=1)
        most = min(_MOST_RES, math.isqrt(MOST_PIXELS // config.batch_size))
        return cls(key, _least_res(config), _STEP_PX[config.dataset.name], most, power=2)


def _least_res(config: RunConfig) -> int:
    """Return the least res; of a volume with few slices the first that has two positions left."""
    least = LEAST_RES[config.dataset.name]
    try:
        check_config(dataclasses.replace(config, res=least))
    except ConfigError:
        return least + _STEP_PX[config.dataset.name]
    return least


@dataclass(frozen=True)
class Limit:
    """The largest value that fits, None if none does, and what a step takes there.

    `kind` says whether the figures are predictions or measurements.
    """

    kind: str
    strategy: str
    largest: int | None
    device_peak_bytes: int | None
    host_peak_bytes: int | None
    step_s: float | None
    why: str
    is_end: bool = False


def limits(words: list[str], console: Console) -> int:
    """Print the limits for `key=value` words, and write limits.json and a picture."""
    own, rest = _split(words)
    key, measure = own.get("of", "res"), own.get("measure", "false") == "true"
    _check(rest, key, measure=measure)
    request = parse(rest)
    config = request.words.checked()
    axis = Axis.of(key, config)
    if measure:
        title = device_name(resolve_device(request.words.device))
        found = _measured(request, axis, console)
    else:
        profile = profile_for(request, config, console)
        title = profile.title
        found = _planned(request, axis, profile, console)
    console.show(limits_table(found, axis, title))
    for limit in found:
        if limit.why:
            console.say(f"{limit.strategy}: {limit.why}")
    _write(request, axis, title, found, console)
    return 0


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    own: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key in _OWN and equals:
            own[key] = value
        else:
            rest.append(word)
    if own.get("of", "res") not in _OTHER:
        raise ConfigError(f"of={own['of']}: choose {' or '.join(_OTHER)}")
    if own.get("measure", "false") not in ("true", "false"):
        raise ConfigError(f"measure={own['measure']}: expected true or false")
    return own, rest


def _check(words: list[str], key: str, *, measure: bool) -> None:
    """Raise ConfigError for words that a run or a plan may have, and limits may not."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if key in given:
        raise ConfigError(f"{key}: is what is looked for; leave it out, or use of={_OTHER[key]}")
    if "," in given.get("res", ""):
        raise ConfigError(f"res={given['res']}: limits takes one value; ask for each by itself")
    if given.get("memory") == "auto":
        raise ConfigError(
            "memory=auto: takes another strategy at another size, and limits are a strategy's; "
            f"choose all, {', '.join(STRATEGIES)}"
        )
    if not measure:
        return
    device = given.get("device", "auto")
    if device not in CHOICES["device"]:
        raise ConfigError(
            f"measure=true runs real steps on this machine; device={device} is a profile of "
            "another one: leave it out, or leave out measure=true"
        )
    if "calibrate" in given:
        raise ConfigError(
            f"calibrate={given['calibrate']}: measure=true predicts nothing, and needs no "
            "calibration; leave one of them out"
        )
    is_slide = given.get("dataset", "wsi") == "wsi"
    if is_slide and "dataset.aspect" in given:
        raise ConfigError(
            f"dataset.aspect={given['dataset.aspect']}: slides are trained on as squares, and "
            "measure=true trains; leave one of them out"
        )


def _planned(request: Request, axis: Axis, profile: Profile, console: Console) -> list[Limit]:
    """Find limits by prediction; what a size was traced for is there for other strategies too."""
    first = request.words.planned(profile)
    planned: dict[int, Planned] = {}
    found: list[Limit] = []
    with console.task("planning", len(request.strategies)) as bar:
        for done, strategy in enumerate(request.strategies, 1):
            ahead = max((limit.largest or 0 for limit in found), default=None)
            secant = Secant(axis.power, planned, ahead)
            found.append(_planned_limit(first, strategy, axis, planned, secant))
            bar.update(done, strategy)
    return found


def _planned_limit(
    first: Planned, strategy: str, axis: Axis, planned: dict[int, Planned], secant: Secant
) -> Limit:
    """Find a strategy's limit; `planned` keeps the sizes that another strategy has asked for."""
    seen: dict[int, Prediction] = {}

    def fits(value: int) -> bool:
        if value not in planned:
            planned[value] = resized(first, **{axis.key: value})
        at = planned[value]
        seen[value] = estimate(at.subject, strategy, at.profile, at.options)
        secant.note(value, _shares(seen[value], at))
        return seen[value].fits

    value = largest(fits, axis.least, axis.step, axis.most, secant)
    at = seen[axis.least if value is None else value]
    why = at.why if value is None else ""
    return Limit(
        kind="prediction",
        strategy=strategy,
        largest=value,
        device_peak_bytes=at.device_peak_bytes,
        host_peak_bytes=at.host_peak_bytes,
        step_s=at.step_s,
        why=why,
        is_end=value is not None and value + axis.step > axis.most,
    )


def _shares(prediction: Prediction, at: Planned) -> tuple[float, float]:
    """Return how full device and host memory would be, NaN where that is not known."""
    setting = Setting(at.subject, at.profile, at.options)
    device_bytes = prediction.device_peak_bytes or prediction.least_budget_bytes
    host_bytes = prediction.host_peak_bytes
    if host_bytes is None:
        host_bytes = prediction.least_host_bytes
    return (
        math.nan if device_bytes is None else device_bytes / setting.limit_bytes,
        math.nan if host_bytes is None else host_bytes / setting.host_limit_bytes,
    )


def _measured(request: Request, axis: Axis, console: Console) -> list[Limit]:
    """Find limits with real steps, one process a try; what does not fit ends in exit code 3."""
    return [_measured_limit(request, strategy, axis, console) for strategy in request.strategies]


def _measured_limit(request: Request, strategy: str, axis: Axis, console: Console) -> Limit:
    seen: dict[int, dict[str, Any]] = {}
    fixed = [*request.words.overrides, f"memory={strategy}", f"device={request.words.device}"]

    def fits(value: int) -> bool:
        console.say(f"{strategy} {axis.key}={value}: training {_N_STEPS} steps")
        started_s = time.monotonic()
        seen[value] = outcome = run_trial([*fixed, f"{axis.key}={value}"], _N_STEPS)
        took = text_of_seconds(time.monotonic() - started_s)
        console.say(f"{strategy} {axis.key}={value}: {_outcome_text(outcome)} ({took})")
        if outcome["status"] == "failed":
            raise RunError(f"memory={strategy} {axis.key}={value} failed: {outcome['why']}")
        return bool(outcome["status"] == "ok")

    value = largest(fits, axis.least, axis.step, axis.most)
    if value is None:
        why = seen[axis.least]["why"]
        return Limit("measurement", strategy, None, None, None, None, why)
    at, use = seen[value], seen[value]["memory_use"]
    return Limit(
        kind="measurement",
        strategy=strategy,
        largest=value,
        device_peak_bytes=use["device_peak_bytes"],
        host_peak_bytes=use["host_peak_bytes"],
        step_s=at["step_s"],
        why="",
        is_end=value + axis.step > axis.most,
    )


def limits_table(found: list[Limit], axis: Axis, title: str) -> Table:
    """Return the limits, a strategy a row."""
    kind = "predicted" if found[0].kind == "prediction" else "measured"
    table = Table(title=f"{kind}: largest {axis.key} on {title}")
    table.add_column("memory")
    for name in (f"largest {axis.key}", "device", "host", "step"):
        table.add_column(name, justify="right")
    for limit in found:
        value = "none" if limit.largest is None else str(limit.largest)
        cells = (
            limit.strategy,
            f"{value} or more" if limit.is_end else value,
            text_of_bytes(limit.device_peak_bytes),
            text_of_bytes(limit.host_peak_bytes),
            text_of_seconds(limit.step_s),
        )
        table.add_row(*map(Text, cells))
    return table


def _write(request: Request, axis: Axis, title: str, found: list[Limit], console: Console) -> None:
    folder = request.out or RUNS / f"limits-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be made ({error.strerror})") from error
    config = request.words.checked()
    rows = [dataclasses.asdict(limit) for limit in found]
    document = {
        "kind": found[0].kind,
        "of": axis.key,
        "dataset": config.dataset.name,
        "model": config.model.name,
        _OTHER[axis.key]: getattr(config, _OTHER[axis.key]),
        "aspect": config.dataset.aspect,
        "overrides": list(request.words.overrides),
        "device": request.words.device,
        "device_name": title,
        "rows": rows,
    }
    write_json(folder / LIMITS_NAME, document)
    kind = "predicted" if found[0].kind == "prediction" else "measured"
    limits_plot(folder / PICTURE_NAME, rows, f"{kind}: largest {axis.key} on {title}", axis.key)
    console.say(f"limits   {folder / LIMITS_NAME}")
    console.say(f"picture  {folder / PICTURE_NAME}")


def _outcome_text(outcome: dict[str, Any]) -> str:
    if outcome["status"] != "ok":
        return "does not fit"
    peak_bytes = outcome["memory_use"]["device_peak_bytes"]
    return f"fits, a step {text_of_seconds(outcome['step_s'])}, {text_of_bytes(peak_bytes)}"
