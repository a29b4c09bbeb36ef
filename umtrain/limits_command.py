"""`umtrain limits`: the largest res or batch that fits, by strategy, predicted or tried out."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from umtrain.config import RES_MULTIPLE_PX
from umtrain.console import Console
from umtrain.device import resolve_device
from umtrain.errors import ConfigError, RunError
from umtrain.files import write_json
from umtrain.memory.options import Options
from umtrain.plan_command import RUNS, Request, parse, text_of_bytes, text_of_seconds
from umtrain.plan_subject import Planned, resolve_profile
from umtrain.planning.limits import largest
from umtrain.planning.machine import free_profile
from umtrain.planning.predict import Prediction, predict
from umtrain.planning.profile import Profile
from umtrain.report.plots_plan import limits_plot
from umtrain.trial import run_trial

LIMITS_NAME, PICTURE_NAME = "limits.json", "limits.png"
_MOST = {"res": 2**18, "batch_size": 2**14}
_N_STEPS = 2  # the second holds the optimizer's state too
_OWN = ("of", "measure")


@dataclass(frozen=True)
class Axis:
    """What is made as large as it goes: `key`, from `least` in steps of `step`."""

    key: str
    least: int
    step: int

    @property
    def most(self) -> int:
        """Return where the search ends."""
        return _MOST[self.key]


AXES = {"res": Axis("res", 128, RES_MULTIPLE_PX), "batch_size": Axis("batch_size", 1, 1)}


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
    axis, measure = AXES[own.get("of", "res")], own.get("measure", "false") == "true"
    if axis.key == "res" and any(word.startswith("res=") for word in rest):
        raise ConfigError("res: is what is looked for; leave it out, or use of=batch_size")
    if axis.key == "batch_size" and any(word.startswith("batch_size=") for word in rest):
        raise ConfigError("batch_size: is what is looked for; leave it out, or use of=res")
    request = parse(rest)
    if measure and request.words.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"measure=true runs real steps on this machine; device={request.words.device} is a "
            "profile of another one"
        )
    if measure:
        profile = free_profile(Options.parse(device=resolve_device(request.words.device).type))
        found = _measured(request, axis, console)
    else:
        profile = resolve_profile(request.words.device, console, again=request.again)
        found = _planned(request, axis, profile, console)
    console.show(limits_table(found, axis, profile))
    for limit in found:
        if limit.why:
            console.say(f"{limit.strategy}: {limit.why}")
    _write(request, axis, profile, found, console)
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
    if own.get("of", "res") not in AXES:
        raise ConfigError(f"of={own['of']}: choose {' or '.join(AXES)}")
    if own.get("measure", "false") not in ("true", "false"):
        raise ConfigError(f"measure={own['measure']}: expected true or false")
    return own, rest


def _planned(request: Request, axis: Axis, profile: Profile, console: Console) -> list[Limit]:
    planned: dict[int, Planned] = {}
    found = []
    with console.task("planning", len(request.strategies)) as bar:
        for done, strategy in enumerate(request.strategies, 1):
            found.append(_planned_limit(request, strategy, axis, profile, planned))
            bar.update(done, strategy)
    return found


def _planned_limit(
    request: Request, strategy: str, axis: Axis, profile: Profile, planned: dict[int, Planned]
) -> Limit:
    """Find a strategy's limit; `planned` keeps the traces that another strategy has asked for."""
    seen: dict[int, Prediction] = {}

    def fits(value: int) -> bool:
        if value not in planned:
            planned[value] = request.words.planned(profile, f"{axis.key}={value}")
        at = planned[value]
        seen[value] = predict(at.subject, strategy, profile, at.options)
        return seen[value].fits

    value = largest(fits, axis.least, axis.step, axis.most)
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


def limits_table(found: list[Limit], axis: Axis, profile: Profile) -> Table:
    """Return the limits, a strategy a row."""
    kind = "predicted" if found[0].kind == "prediction" else "measured"
    table = Table(title=f"{kind}: largest {axis.key} on {profile.title}")
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


def _write(
    request: Request, axis: Axis, profile: Profile, found: list[Limit], console: Console
) -> None:
    folder = request.out or RUNS / f"limits-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be made ({error.strerror})") from error
    rows = [asdict(limit) for limit in found]
    document = {
        "kind": found[0].kind,
        "of": axis.key,
        "overrides": list(request.words.overrides),
        "device": profile.title,
        "rows": rows,
    }
    write_json(folder / LIMITS_NAME, document)
    kind = "predicted" if found[0].kind == "prediction" else "measured"
    limits_plot(
        folder / PICTURE_NAME, rows, f"{kind}: largest {axis.key} on {profile.title}", axis.key
    )
    console.say(f"limits   {folder / LIMITS_NAME}")
    console.say(f"picture  {folder / PICTURE_NAME}")


def _outcome_text(outcome: dict[str, Any]) -> str:
    if outcome["status"] != "ok":
        return "does not fit"
    peak_bytes = outcome["memory_use"]["device_peak_bytes"]
    return f"fits, a step {text_of_seconds(outcome['step_s'])}, {text_of_bytes(peak_bytes)}"
