"""memory=stream, planned by the engine's own plans: its arena is the step's peak, exactly."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from umtrain.errors import OutOfMemoryError
from umtrain.memory.stream import choose_strip_bytes, maps_bytes, other_bytes, strips_bytes
from umtrain.memory.tensors import batch_arguments
from umtrain.planning.residence import process_bytes
from umtrain.planning.scratch import scratch_bytes
from umtrain.planning.step import Operation, Phase, StepTrace
from umtrain.planning.strategies import Setting
from umtrain.planning.streaming_seconds import (
    beside_streaming_seconds,
    convolution_of,
    streaming_seconds,
)
from umtrain.planning.usage import resident_bytes
from umtrain.streaming.module import Streamer
from umtrain.streaming.plan import NoPlanError
from umtrain.streaming.program import Program
from umtrain.streaming.running import Settings
from umtrain.streaming.storage import HostBlock, HostMemory

_N_ROUNDS = 12  # each leaves about an eighth of what was missing
_WAYS = 2  # what is put out comes back: half of the traffic each way
# What is there beside maps, gradients and the model's own, of the room that a budget makes for it:
# measured at 256 to 2048 pixels without a GPU, on an H100 and an H200 with ResNet-50 and -101.
# On a GPU that is with what kernels take for themselves.
_STRIPS_AT_ONCE = {"cpu": 4, "cuda": 4}
# Where maps have several strips, first, middle and last ones have kernels of their own.
_KERNELS_BYTES = {"cpu": 20 * 2**20, "cuda": 0}


@dataclass(frozen=True)
class Streamed:
    """A streamed step: peak memory, traffic and seconds."""

    device_peak_bytes: int
    host_peak_bytes: int
    moved_bytes: int
    compute_s: float
    stall_s: float
    summary: str


class _Room(HostMemory):
    """Host memory that is only asked how much it has."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes

    def room_bytes(self) -> int:
        """See `HostMemory`."""
        return self._n_bytes

    def take(self, n_bytes: int) -> HostBlock:
        """See `HostMemory`."""
        raise AssertionError("a plan puts nothing out")


def plan_stream(setting: Setting) -> Streamed:
    """Return how the engine would stream the step within the limit.

    Raises OutOfMemoryError if it cannot (`least_stream_bytes` says what would do), and ConfigError
    for a model of which nothing can be streamed.
    """
    arena_bytes = _arena_bytes(setting)
    compiled = _compile(setting, arena_bytes)
    plans = [part.plan for part in compiled]
    profile = setting.profile
    largest_bytes = max((m.n_bytes for part in compiled for m in part.program.maps), default=0)
    others = _beside_maps_bytes(setting, largest_bytes)
    if profile.kind == "cpu":
        others += max((_scratch_bytes(part.program, setting) for part in compiled), default=0)
    compute_s = sum(sum(streaming_seconds(c.program, c.plan, profile)) for c in compiled)
    compute_s += beside_streaming_seconds(setting.subject.trace(), profile)
    moved_bytes = int(sum(plan.moved_bytes for plan in plans))
    link_s = moved_bytes / _WAYS / profile.out_bytes_per_s
    link_s += moved_bytes / _WAYS / profile.in_bytes_per_s
    peak_bytes = sum(plan.arena_bytes for plan in plans) + others
    return Streamed(
        device_peak_bytes=peak_bytes,
        host_peak_bytes=sum(plan.host_bytes for plan in plans),
        moved_bytes=moved_bytes,
        compute_s=compute_s,
        stall_s=max(0.0, link_s - compute_s),
        summary="; ".join(plan.summary() for plan in plans),
    )


def least_stream_bytes(setting: Setting) -> int:
    """Return the least budget that streaming runs in.

    Strips are a share of the budget, so it is found where a budget and what it has to hold meet.
    """
    arena_bytes = _least_arena_bytes(setting)
    budget_bytes = 0
    for _ in range(_N_ROUNDS):
        tried = replace(setting, options=replace(setting.options, device_budget_bytes=budget_bytes))
        budget_bytes = _budget_for(tried, arena_bytes)
    return budget_bytes


def _least_arena_bytes(setting: Setting) -> int:
    try:
        _compile(setting, 1)
    except OutOfMemoryError as error:
        if isinstance(error, NoPlanError):
            return error.missing_bytes + 1
        raise
    return 0


def _budget_for(setting: Setting, arena_bytes: int) -> int:
    """Return the budget whose part for maps is `arena_bytes`, with strips of the setting's size."""
    trace, budget_bytes = setting.subject.trace(), setting.limit_bytes
    needed_bytes = _held_bytes(setting, trace) + arena_bytes + _still_to_come_bytes(setting, trace)
    return needed_bytes + budget_bytes - maps_bytes(budget_bytes, budget_bytes)


def _compile(setting: Setting, arena_bytes: int) -> Any:
    subject = setting.subject
    settings = Settings(
        lambda: arena_bytes,
        _Room(setting.host_limit_bytes),
        _strip_bytes(setting),
    )
    streamer = Streamer(_with_memory(subject.model), settings)
    with subject.autocast():
        return streamer.compile(*batch_arguments(subject.sample_batch))


def _with_memory(model: nn.Module) -> nn.Module:
    """Return `model`, or where it is on "meta" one like it whose weights are never read."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return copy.deepcopy(model).to_empty(device="cpu")
    return model


def _strip_bytes(setting: Setting) -> int:
    return choose_strip_bytes(setting.profile.kind, setting.options.device_budget_bytes)


def _arena_bytes(setting: Setting) -> int:
    """Return the room for maps, as the strategy computes it when it is attached."""
    trace, budget_bytes = setting.subject.trace(), setting.options.device_budget_bytes
    left_bytes = setting.limit_bytes - _held_bytes(setting, trace)
    return maps_bytes(left_bytes, budget_bytes) - _still_to_come_bytes(setting, trace)


def _held_bytes(setting: Setting, trace: StepTrace) -> int:
    """Return what is on the device when the strategy is attached."""
    batch_bytes = trace.input_bytes if setting.profile.kind == "cuda" else 0
    return trace.parameter_bytes + batch_bytes


def _still_to_come_bytes(setting: Setting, trace: StepTrace) -> int:
    strips = strips_bytes(setting.profile.kind, _strip_bytes(setting))
    return other_bytes(trace.parameter_bytes, 0) + strips


def _scratch_bytes(program: Program, setting: Setting) -> int:
    """Return the most that a convolution takes for itself, on a strip's rows."""
    phases: tuple[Phase, ...] = ("forward", "backward")
    whole = [convolution_of(program, s, phase) for s in program.segments for phase in phases]
    strips = [_of_strip(each, _strip_bytes(setting)) for each in whole if each is not None]
    return max((n for each in strips for n in scratch_bytes(each, setting.profile)), default=0)


def _of_strip(operation: Operation, strip_bytes: int) -> Operation:
    """Return a convolution of as many rows, or slices, as a strip has."""
    assert operation.convolution is not None
    n_images, n_rows, *others = operation.convolution.output
    share = min(1.0, strip_bytes / max(operation.read_bytes, operation.written_bytes))
    n_of_strip = math.ceil(share * n_rows)
    return replace(
        operation,
        flops=operation.flops * n_of_strip / n_rows,
        convolution=replace(operation.convolution, output=(n_images, n_of_strip, *others)),
    )


def _beside_maps_bytes(setting: Setting, largest_map_bytes: int) -> int:
    """Return what a step holds beside maps; no strip is larger than a map."""
    trace, kind = setting.subject.trace(), setting.profile.kind
    gradients = sum(a.n_bytes for a in trace.allocations if a.kind == "gradient")
    weights = trace.parameter_bytes // 2 if setting.subject.precision == "bf16" else 0
    strip_bytes = _strip_bytes(setting)
    strips = _STRIPS_AT_ONCE[kind] * min(strip_bytes, largest_map_bytes)
    strips += _KERNELS_BYTES[kind] if largest_map_bytes > strip_bytes else 0
    others = resident_bytes(trace, kind) + process_bytes(trace, kind)
    return others + gradients + weights + strips
