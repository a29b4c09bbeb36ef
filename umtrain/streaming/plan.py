"""The plan of a step: what is kept, run again or put out to host memory, and where all of it lies.

Everything is kept if it fits. Else the plan with the least estimated time is taken among those
that run the 0, 1, 2, … cheapest groups again (least work per byte that it frees) and put out
what still does not fit, longest-lived and least read first. Buffers on the device are placed in
one arena by their lifetimes, largest first, as compilers place static memory: the arena's size is
the step's peak, known before the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from umtrain.errors import OutOfMemoryError
from umtrain.streaming.program import Program
from umtrain.streaming.schedule import (
    Buffer,
    Needs,
    Schedule,
    groups_of,
    make_schedule,
    step_flops,
)
from umtrain.units import format_bytes

_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True)
class Speeds:
    """What the choice between running again and putting out is made by; orders of magnitude do."""

    flops_per_s: float = 4e11
    host_bytes_per_s: float = 2e9


@dataclass
class Plan:
    """A schedule with a place for each buffer: an offset in the arena, or None for host memory."""

    schedule: Schedule
    offsets: list[int | None]
    arena_bytes: int
    n_groups: int
    n_groups_again: int

    @property
    def host_bytes(self) -> int:
        """Return the size of all buffers in host memory."""
        pairs = zip(self.schedule.buffers, self.offsets, strict=True)
        return sum(buffer.n_bytes for buffer, offset in pairs if offset is None)

    def summary(self) -> str:
        """Return the plan in a line."""
        again = f"{self.n_groups_again} of {self.n_groups} groups run again in backward"
        return f"feature maps {format_bytes(self.arena_bytes)} on the device, " + (
            f"{format_bytes(self.host_bytes)} in host memory, {again}"
        )


def make_plan(
    program: Program,
    needs: Needs,
    budget_bytes: int | None,
    can_use_host: bool,
    speeds: Speeds | None = None,
) -> Plan:
    """Return the fastest plan whose arena is within `budget_bytes` (None: keep everything).

    Raises OutOfMemoryError, naming the least budget, if there is none.
    """
    groups = groups_of(program)
    order = _by_work_per_byte(program, groups)
    plans: list[tuple[float, Plan]] = []
    least_bytes: int | None = None
    for n_again in range(len(groups) + 1):
        again = [g in order[:n_again] for g in range(len(groups))]
        schedule = make_schedule(program, needs, groups, again)
        plan = _fit(schedule, budget_bytes, can_use_host, len(groups), n_again)
        if budget_bytes is None or plan.arena_bytes <= budget_bytes:
            plans.append((_seconds(program, plan, speeds or Speeds()), plan))
        least_bytes = min(plan.arena_bytes, least_bytes or plan.arena_bytes)
        if plans and plan.host_bytes == 0:
            break
    if not plans:
        assert budget_bytes is not None
        assert least_bytes is not None
        raise NoPlanError(budget_bytes, least_bytes)
    return min(plans, key=lambda pair: pair[0])[1]


class NoPlanError(OutOfMemoryError):
    """No plan fits; `missing_bytes` more would do."""

    def __init__(self, budget_bytes: int, least_bytes: int) -> None:
        self.missing_bytes = least_bytes - budget_bytes
        super().__init__(
            f"feature maps need at least {format_bytes(least_bytes)} of device memory at once; "
            f"{format_bytes(max(0, budget_bytes))} are left for them"
        )


def _by_work_per_byte(program: Program, groups: Sequence[range]) -> list[int]:
    """Return groups in the order in which they are worth running again."""

    def cost(group: range) -> float:
        segments = [program.segments[i] for i in group]
        inner = [s for s in segments if s.out is not None][:-1]
        freed = sum(program.maps[s.out].n_bytes for s in inner if s.out is not None)
        return sum(s.flops for s in inner) / freed if freed else float("inf")

    return sorted(range(len(groups)), key=lambda g: cost(groups[g]))


def _seconds(program: Program, plan: Plan, speeds: Speeds) -> float:
    moved = sum(
        buffer.n_bytes * buffer.accesses
        for buffer, offset in zip(plan.schedule.buffers, plan.offsets, strict=True)
        if offset is None
    )
    work = sum(step_flops(program, plan.schedule))
    return work / speeds.flops_per_s + moved / speeds.host_bytes_per_s


def _fit(
    schedule: Schedule, budget_bytes: int | None, can_use_host: bool, n_groups: int, n_again: int
) -> Plan:
    """Put buffers out until the arena is within the budget, or nothing is left to put out."""
    is_out = [False] * len(schedule.buffers)
    target_bytes = budget_bytes
    while True:
        if target_bytes is not None and can_use_host:
            _put_out(schedule, is_out, target_bytes)
        offsets, arena_bytes = place(schedule.buffers, is_out)
        plan = Plan(schedule, offsets, arena_bytes, n_groups, n_again)
        if budget_bytes is None or target_bytes is None or arena_bytes <= budget_bytes:
            return plan
        if not can_use_host or all(is_out) or target_bytes <= 0:
            return plan
        target_bytes -= max(_ALIGNMENT_BYTES, arena_bytes - budget_bytes)


def _put_out(schedule: Schedule, is_out: list[bool], target_bytes: int) -> None:
    """Mark buffers until at no action more than `target_bytes` are alive on the device."""
    live = schedule.live_bytes()
    for buffer, out in zip(schedule.buffers, is_out, strict=True):
        if out:
            _subtract(live, buffer)
    while live and max(live) > target_bytes:
        peak = live.index(max(live))
        candidates = [
            i
            for i, buffer in enumerate(schedule.buffers)
            if not is_out[i] and buffer.first <= peak <= buffer.last
        ]
        if not candidates:
            return
        best = max(candidates, key=lambda i: _worth(schedule.buffers[i]))
        is_out[best] = True
        _subtract(live, schedule.buffers[best])


def _worth(buffer: Buffer) -> float:
    """Return how well a buffer is put out: long alive, seldom read or written."""
    return (buffer.last - buffer.first + 1) / buffer.accesses


def _subtract(live: list[int], buffer: Buffer) -> None:
    for action in range(buffer.first, buffer.last + 1):
        live[action] -= buffer.n_bytes


def place(buffers: Sequence[Buffer], is_out: Sequence[bool]) -> tuple[list[int | None], int]:
    """Return an offset for each buffer that is not out, and the end of the last.

    Largest first, each at the lowest offset where it meets no other that is alive when it is.
    """
    offsets: list[int | None] = [None] * len(buffers)
    inside = [i for i, out in enumerate(is_out) if not out]
    placed: list[int] = []
    end_bytes = 0
    for index in sorted(inside, key=lambda i: -buffers[i].n_bytes):
        buffer = buffers[index]
        size_bytes = -(-buffer.n_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        taken = sorted(
            (offsets[j] or 0, (offsets[j] or 0) + buffers[j].n_bytes)
            for j in placed
            if buffers[j].first <= buffer.last and buffer.first <= buffers[j].last
        )
        offset = 0
        for start, stop in taken:
            if start - offset >= size_bytes:
                break
            offset = max(offset, -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        offsets[index] = offset
        placed.append(index)
        end_bytes = max(end_bytes, offset + size_bytes)
    return offsets, end_bytes
