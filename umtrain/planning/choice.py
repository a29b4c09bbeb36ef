"""The strategy that memory=auto takes: the fastest by prediction that surely fits."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from umtrain.errors import OutOfMemoryError
from umtrain.memory.options import Options
from umtrain.planning.predict import Prediction, estimate, predict
from umtrain.planning.profile import Profile
from umtrain.planning.strategies import STREAM
from umtrain.planning.subject import Subject
from umtrain.units import format_bytes

_MIB = 2**20
# Of the memory that there is: predictions are within a tenth, and others use the machine too.
MARGIN = 0.85
# A prediction of time is that sure: a strategy further down the list has to promise more than this.
_CLEARLY_FASTER = 0.9
# They do all that vanilla does, and more; so does streaming, but that on a GPU it launches less.
_NEVER_FASTER = {
    "cpu": ("stream", "checkpoint", "lms", "um_group_prefetch"),
    "cuda": ("checkpoint", "lms"),
}
# Simplest first, which breaks ties.
CANDIDATES = {
    "cpu": ("vanilla", "stream", "checkpoint", "um_group_prefetch", "lms"),
    "cuda": ("vanilla", "stream", "checkpoint", "lms"),
}


@dataclass(frozen=True)
class Choice:
    """What was chosen, among which predictions."""

    prediction: Prediction
    considered: tuple[Prediction, ...]
    limit_bytes: int

    @property
    def sentence(self) -> str:
        """Return what memory=auto says: what, and why not the others."""
        chosen = self.prediction
        others = self._others() or "nothing else would be faster"
        return (
            f"{chosen.strategy}, predicted {_seconds(chosen)} a step and "
            f"{_size(chosen.device_peak_bytes)} of {format_bytes(self.limit_bytes)}; {others}"
        )

    def _others(self) -> str:
        others = [each for each in self.considered if each is not self.prediction]
        return "; ".join(map(_words, others))


def choose(
    subject: Subject,
    profile: Profile,
    options: Options,
    candidates: Sequence[str] | None = None,
) -> Choice:
    """Return the fastest of the candidates that fits in device and host memory, with a margin.

    The first candidate in the list stays unless another is clearly faster. Raises
    OutOfMemoryError, naming the least budget of all, if none fits, and ConfigError if the
    model cannot run without data.
    """
    names = CANDIDATES[profile.kind] if candidates is None else tuple(candidates)
    limit_bytes = options.device_budget_bytes or profile.device_bytes
    considered: list[Prediction] = []
    for name in names:
        is_beaten = any(each.strategy == "vanilla" and each.fits for each in considered)
        if is_beaten and name in _NEVER_FASTER[profile.kind]:
            continue
        considered.append(estimate(subject, name, *_with_margin(name, profile, options)))
    fitting = [each for each in considered if each.fits and each.step_s is not None]
    if not fitting:
        known = [predict(subject, name, profile, options) for name in names]
        raise OutOfMemoryError(_least_text(known, considered, profile, options))
    return Choice(_fastest(fitting), tuple(considered), limit_bytes)


def _with_margin(name: str, profile: Profile, options: Options) -> tuple[Profile, Options]:
    """Leave a part of the memory out, but for streaming, which keeps to what it is given."""
    host_bytes = int(MARGIN * profile.host_bytes)
    if name == STREAM:
        return dataclasses.replace(profile, host_bytes=host_bytes), options
    careful = dataclasses.replace(
        profile, device_bytes=int(MARGIN * profile.device_bytes), host_bytes=host_bytes
    )
    if options.device_budget_bytes is None:
        return careful, options
    budget_bytes = int(MARGIN * options.device_budget_bytes)
    return careful, dataclasses.replace(options, device_budget_bytes=budget_bytes)


def _fastest(fitting: Sequence[Prediction]) -> Prediction:
    best = fitting[0]
    for each in fitting[1:]:
        if _step_s(each) < _CLEARLY_FASTER * _step_s(best):
            best = each
    return best


def _step_s(prediction: Prediction) -> float:
    assert prediction.step_s is not None
    return prediction.step_s


def _least_text(
    predicted: Sequence[Prediction],
    careful: Sequence[Prediction],
    profile: Profile,
    options: Options,
) -> str:
    """Return what would do: more of what the device has, or more host memory.

    `careful` are the predictions that the choice was made by, with the margin.
    """
    limit_bytes = options.device_budget_bytes or profile.device_bytes
    what = "memory.device_budget" if options.device_budget_bytes else "what the device has"
    parts = [f"memory=auto: no strategy fits in {format_bytes(limit_bytes)} ({what})"]
    short = [each for each in careful if each.least_host_bytes is not None]
    if short:
        host_bytes = options.host_budget_bytes or profile.host_bytes
        least = min(short, key=lambda each: each.least_host_bytes or 0)
        needed = format_bytes(math.ceil((least.least_host_bytes or 0) / MARGIN))
        parts.append(
            f"{least.strategy} would with {needed} of host memory in the place of "
            f"{format_bytes(host_bytes)} ({_host_words(profile, options)})"
        )
    known = [each for each in predicted if each.least_budget_bytes is not None]
    if known:
        least = min(known, key=_least_bytes)
        needed = format_bytes(_least_bytes(least))
        parts.append(f"{least.strategy} needs the least, predicted {needed}: give it that")
    return f"{'; '.join(parts)}{', or' if known else ';'} lower res or batch_size"


def _host_words(profile: Profile, options: Options) -> str:
    if options.host_budget_bytes is not None:
        return "raise memory.host_budget"
    if profile.kind == "cpu":
        return "free that on its disk, or name another by memory.spill_dir"
    return "RAM"


def _least_bytes(prediction: Prediction) -> int:
    """Return the least that the strategy is chosen with, the margin in it, in whole MiB."""
    least = prediction.least_budget_bytes or 0
    needed = least if prediction.strategy == STREAM else least / MARGIN
    return math.ceil(needed / _MIB) * _MIB


def _words(prediction: Prediction) -> str:
    """Return what a strategy that was not taken would need, or why it is out of the question."""
    name = prediction.strategy
    if prediction.device_peak_bytes is not None:
        figures = f"{name} {_seconds(prediction)}, {_size(prediction.device_peak_bytes)}"
        return figures if prediction.fits else f"{figures} (does not fit)"
    is_short = prediction.least_budget_bytes or prediction.least_host_bytes
    return f"{name} (does not fit)" if is_short else f"{name} ({prediction.why})"


def _seconds(prediction: Prediction) -> str:
    return "?" if prediction.step_s is None else f"{prediction.step_s:.2g} s"


def _size(n_bytes: int | None) -> str:
    return "?" if n_bytes is None else format_bytes(n_bytes)
