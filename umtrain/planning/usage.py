"""What a strategy makes of a step: which buffers are on the device when, and what moves."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from umtrain.planning.profile import Profile
from umtrain.planning.scratch import scratch_bytes
from umtrain.planning.step import Allocation, StepTrace


@dataclass(frozen=True)
class Event:
    """Buffer `buffer` is taken (n_bytes more than 0) or freed (0)."""

    buffer: int
    n_bytes: int = 0


@dataclass(frozen=True)
class Stay:
    """A buffer in device memory from the operation `first` to the operation `last`."""

    n_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Usage:
    """A step under one strategy.

    `stays` are buffers that an allocator hands out; `pages` are saved tensors on pages that the OS
    maps beside them. `stall_s` is what compute waits for copies or faults, `extra_s` work that
    ordinary training has not. `least_stays` are what it would keep under the least
    budget, where that is less. `hole_share` is what holes between buffers take at most, as a share
    of those.
    """

    trace: StepTrace
    stays: list[Stay]
    pages: list[Stay] = field(default_factory=list)
    host_peak_bytes: int = 0
    out_bytes: int = 0
    in_bytes: int = 0
    stall_s: float = 0.0
    extra_s: float = 0.0
    least_stays: list[Stay] | None = None
    hole_share: float = 0.0


# What a step allocates; the rest was there before it.
_OF_THE_STEP = ("saved", "temporary", "gradient")


def step_allocations(trace: StepTrace) -> list[Allocation]:
    """Return what a step allocates."""
    return [a for a in trace.allocations if a.kind in _OF_THE_STEP]


def stay_of(allocation: Allocation) -> Stay:
    """Return the stay of an allocation that ordinary training leaves where it is."""
    return Stay(allocation.n_bytes, allocation.first, allocation.last)


def kept(trace: StepTrace) -> Usage:
    """Return ordinary training's usage: everything stays from its first to its last use."""
    return Usage(trace, [stay_of(a) for a in step_allocations(trace)])


def resident_bytes(trace: StepTrace, device_kind: str) -> int:
    """Return what is in device memory all through a step: model, optimizer's state and batch.

    Without a GPU batches are not in it: they lie where the sample batch did when the strategy was
    prepared, which meters and budgets take as the base.
    """
    resident = ("parameter", "buffer", "state")
    batch_bytes = trace.input_bytes if device_kind == "cuda" else 0
    return sum(a.n_bytes for a in trace.allocations if a.kind in resident) + batch_bytes


def events(usage: Usage, profile: Profile) -> Iterator[list[Event]]:
    """Yield, for each operation, its allocations and frees in order, scratch memory included."""
    n_operations = len(usage.trace.operations)
    starting: list[list[int]] = [[] for _ in range(n_operations)]
    ending: list[list[int]] = [[] for _ in range(n_operations)]
    for index, stay in enumerate(usage.stays):
        starting[stay.first].append(index)
        ending[stay.last].append(index)
    for position, operation in enumerate(usage.trace.operations):
        found = [Event(index, usage.stays[index].n_bytes) for index in starting[position]]
        for number, n_bytes in enumerate(scratch_bytes(operation, profile), 1):
            found += [Event(-number, n_bytes), Event(-number)]
        yield found + [Event(index) for index in ending[position]]


def page_bytes(usage: Usage) -> list[int]:
    """Return the bytes of mapped pages during each operation."""
    changes = [0] * (len(usage.trace.operations) + 1)
    for stay in usage.pages:
        changes[stay.first] += stay.n_bytes
        changes[stay.last + 1] -= stay.n_bytes
    total, levels = 0, []
    for change in changes[:-1]:
        total += change
        levels.append(total)
    return levels
