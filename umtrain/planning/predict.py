"""Predict what a training step takes under a memory strategy: memory, traffic, seconds."""

from dataclasses import dataclass, replace

from umtrain.errors import ConfigError, OutOfMemoryError
from umtrain.memory.options import Options
from umtrain.planning.profile import Profile
from umtrain.planning.residence import least_bytes, residence_of
from umtrain.planning.strategies import PLANNERS, STREAM, Setting
from umtrain.planning.streamed import least_stream_bytes, plan_stream
from umtrain.planning.subject import Subject
from umtrain.planning.usage import Usage
from umtrain.streaming.building import UnstreamableError
from umtrain.streaming.plan import HostTooSmallError, NoPlanError
from umtrain.units import format_bytes


@dataclass(frozen=True)
class Prediction:
    """What a step is predicted to take; nothing here was measured.

    Memory is what `umtrain.memory.stats.MemoryStats` calls by the same names. `compute_s` is the
    kernels' time, `copy_or_fault_s` what compute waits for on top, `step_s` all of it.
    `least_budget_bytes` is the smallest memory.device_budget that runs, `least_host_bytes` the host
    memory that would do where device memory would and host memory is short. What cannot be
    predicted is None; `why` says so, or why it does not fit.
    """

    strategy: str
    fits: bool
    why: str = ""
    device_peak_bytes: int | None = None
    host_peak_bytes: int | None = None
    swapped_out_bytes: int | None = None
    swapped_in_bytes: int | None = None
    compute_s: float | None = None
    copy_or_fault_s: float | None = None
    step_s: float | None = None
    least_budget_bytes: int | None = None
    least_host_bytes: int | None = None


def predict(subject: Subject, strategy: str, profile: Profile, options: Options) -> Prediction:
    """Return what a step of `subject` takes under `strategy` on a machine of `profile`.

    What fits is judged against options.device_budget_bytes, or else all that the profile has; host
    memory likewise. A strategy that cannot run the model is predicted not to fit, with the
    reason. Raises ConfigError if the model cannot run without data.
    """
    prediction = estimate(subject, strategy, profile, options)
    known = (prediction.device_peak_bytes, prediction.least_budget_bytes)
    if strategy != STREAM or known == (None, None):
        return prediction
    least = _least_of_stream(Setting(subject, profile, options))
    return replace(prediction, least_budget_bytes=least)


def estimate(subject: Subject, strategy: str, profile: Profile, options: Options) -> Prediction:
    """Return what `predict` does, but for the least budget of streaming, which takes long.

    Where streaming does not fit that is what it would about take, and None where it does.
    """
    subject.trace()
    setting = Setting(subject, profile, options)
    try:
        if strategy == STREAM:
            return _streamed(setting)
        return _judged(setting, strategy, PLANNERS[strategy](setting))
    except (ConfigError, UnstreamableError) as error:
        return Prediction(strategy, fits=False, why=str(error))


def _judged(setting: Setting, strategy: str, usage: Usage) -> Prediction:
    subject, profile = setting.subject, setting.profile
    residence = residence_of(usage, profile, is_budgeted=setting.is_budgeted)
    peak_bytes = residence.peak_bytes
    least = least_bytes(usage, profile)
    compute_s = sum(subject.seconds(usage.trace, profile)) + usage.extra_s
    compute_s += residence.fresh_bytes * profile.first_touch_s_per_byte
    why = _why(setting, peak_bytes, usage.host_peak_bytes)
    return Prediction(
        strategy,
        fits=not why,
        why=why,
        device_peak_bytes=peak_bytes,
        host_peak_bytes=usage.host_peak_bytes,
        swapped_out_bytes=usage.out_bytes,
        swapped_in_bytes=usage.in_bytes,
        compute_s=compute_s,
        copy_or_fault_s=usage.stall_s,
        step_s=compute_s + usage.stall_s,
        least_budget_bytes=least,
        least_host_bytes=_least_host_bytes(setting, peak_bytes, usage.host_peak_bytes),
    )


def _streamed(setting: Setting) -> Prediction:
    try:
        planned = plan_stream(setting)
    except HostTooSmallError as error:
        return Prediction(STREAM, fits=False, why=str(error), least_host_bytes=error.needed_bytes)
    except NoPlanError as error:
        about_bytes = setting.limit_bytes + error.missing_bytes
        return Prediction(STREAM, fits=False, why=str(error), least_budget_bytes=about_bytes)
    except OutOfMemoryError as error:
        return Prediction(STREAM, fits=False, why=str(error))
    why = _why(setting, planned.device_peak_bytes, planned.host_peak_bytes)
    return Prediction(
        STREAM,
        fits=not why,
        why=why,
        device_peak_bytes=planned.device_peak_bytes,
        host_peak_bytes=planned.host_peak_bytes,
        swapped_out_bytes=planned.moved_bytes // 2,
        swapped_in_bytes=planned.moved_bytes // 2,
        compute_s=planned.compute_s,
        copy_or_fault_s=planned.stall_s,
        step_s=planned.compute_s + planned.stall_s,
        least_host_bytes=_least_host_bytes(
            setting, planned.device_peak_bytes, planned.host_peak_bytes
        ),
    )


def _least_of_stream(setting: Setting) -> int | None:
    """Return the least budget of streaming; None where host memory is what is too small."""
    try:
        return least_stream_bytes(setting)
    except OutOfMemoryError:
        return None


def _least_host_bytes(setting: Setting, device_bytes: int, host_bytes: int) -> int | None:
    is_short = host_bytes > setting.host_limit_bytes
    return host_bytes if is_short and device_bytes <= setting.limit_bytes else None


def _why(setting: Setting, device_bytes: int, host_bytes: int) -> str:
    """Return why it does not fit, "" if it does."""
    if device_bytes > setting.limit_bytes:
        return f"needs {format_bytes(device_bytes)} of {format_bytes(setting.limit_bytes)}"
    if host_bytes > setting.host_limit_bytes:
        limit = format_bytes(setting.host_limit_bytes)
        return f"needs {format_bytes(host_bytes)} of {limit} of host memory"
    return ""
