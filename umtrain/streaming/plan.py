"""The plan of a step: what is kept, run again or put out to host memory, and where all of it lies.

Everything is kept if it fits. Else the plan with the least estimated time is taken among those
that make the 0, 1, 2, … cheapest maps again (least work per byte that it frees) and put out
what still does not fit, by the least traffic: first what has a long pause between forward and
backward, once out and once in; then, where even that is too much at once, what is read seldom.
Buffers on the device are placed in one arena by their lifetimes, largest first, as compilers place
static memory: the arena's size is the step's peak, known before the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from umtrain.errors import OutOfMemoryError
from umtrain.streaming.program import Program
from umtrain.streaming.schedule import (
    Buffer,
    Needs,
    Schedule,
    groups_of,
    inner_maps,
    make_schedule,
    step_flops,
)
from umtrain.streaming.storage import ALIGNMENT_BYTES
from umtrain.units import format_bytes

_SWAP_TRAFFIC = 2.0  # once out, once in

# On the device all its life; there but for its longest pause, as a copy is in host memory; or in
# host memory only, read and written strip by strip.
Stay = Literal["kept", "swapped", "out"]


@dataclass(frozen=True)
class Speeds:
    """What the choice between running again and putting out is made by; orders of magnitude do."""

    flops_per_s: float
    host_bytes_per_s: float


# Two cores and a disk; an H100 on PCIe 5, whose ResNet-50 is bound by memory.
SPEEDS = {"cpu": Speeds(3e11, 4e9), "cuda": Speeds(1e14, 4e10)}


@dataclass(frozen=True)
class Resumption:
    """When a swapped buffer is on the device again, and where in the arena."""

    action: int
    offset: int


@dataclass
class Plan:
    """A schedule with a stay and a place for each buffer.

    `offsets` are in the arena, None for what is out; `resumed` says where swapped buffers return.
    """

    schedule: Schedule
    stays: list[Stay]
    offsets: list[int | None]
    resumed: dict[int, Resumption]
    arena_bytes: int
    n_maps: int = 0

    @property
    def n_made_again(self) -> int:
        """Return how many maps are made twice."""
        return sum(action.kind == "again" for action in self.schedule.actions)

    @property
    def host_bytes(self) -> int:
        """Return the size of all buffers that are in host memory at some time."""
        pairs = zip(self.schedule.buffers, self.stays, strict=True)
        return sum(buffer.n_bytes for buffer, stay in pairs if stay != "kept")

    @property
    def moved_bytes(self) -> float:
        """Return about what moves to and from host memory in a step."""
        traffic = {"kept": 0.0, "swapped": _SWAP_TRAFFIC}
        pairs = zip(self.schedule.buffers, self.stays, strict=True)
        return sum(b.n_bytes * traffic.get(stay, float(len(b.touches))) for b, stay in pairs)

    def summary(self) -> str:
        """Return the plan in a line."""
        again = f"{self.n_made_again} of {self.n_maps} maps made again in backward"
        return f"feature maps {format_bytes(self.arena_bytes)} on the device, " + (
            f"{format_bytes(self.host_bytes)} in host memory, {again}"
        )


def make_plan(
    program: Program,
    needs: Needs,
    budget_bytes: int | None,
    host_room_bytes: Callable[[], int] | None,
    speeds: Speeds = SPEEDS["cpu"],
) -> Plan:
    """Return the fastest plan whose arena is within `budget_bytes` (None: keep everything).

    `host_room_bytes` is asked, where a plan puts something out, how much host memory can hold;
    None: there is no host memory. Raises OutOfMemoryError, naming the least, if there is no plan.
    """
    groups = groups_of(program)
    inner = inner_maps(program, groups) if any(needs.backward) else {}
    order = _by_work_per_byte(program, inner)
    plans: list[tuple[float, Plan]] = []
    least_bytes: int | None = None
    least_host_bytes: int | None = None
    for n_again in range(len(order) + 1):
        schedule = make_schedule(program, needs, groups, set(order[:n_again]))
        plan = _fit(schedule, budget_bytes, host_room_bytes is not None)
        plan.n_maps = len(program.maps)
        if budget_bytes is None or plan.arena_bytes <= budget_bytes:
            if host_room_bytes is None or plan.host_bytes <= host_room_bytes():
                plans.append((_seconds(program, plan, speeds), plan))
            least_host_bytes = min(plan.host_bytes, least_host_bytes or plan.host_bytes)
        least_bytes = min(plan.arena_bytes, least_bytes or plan.arena_bytes)
        if plans and plan.host_bytes == 0:
            break
    if not plans:
        if least_host_bytes is not None and host_room_bytes is not None:
            raise HostTooSmallError(least_host_bytes, host_room_bytes())
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


class HostTooSmallError(OutOfMemoryError):
    """Host memory has not the room for what has to be put out; `needed_bytes` would do."""

    def __init__(self, needed_bytes: int, room_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        super().__init__(
            f"host memory would run out: feature maps need at least {format_bytes(needed_bytes)} "
            f"of it and it has {format_bytes(room_bytes)}; raise memory.host_budget or "
            "memory.device_budget, choose another memory.spill_dir, or lower res"
        )


def _by_work_per_byte(program: Program, producers: dict[int, int]) -> list[int]:
    """Return maps in the order in which they are worth making again."""

    def cost(index: int) -> float:
        return program.segments[producers[index]].flops / program.maps[index].n_bytes

    return sorted(producers, key=cost)


def _seconds(program: Program, plan: Plan, speeds: Speeds) -> float:
    work = sum(step_flops(program, plan.schedule))
    return work / speeds.flops_per_s + plan.moved_bytes / speeds.host_bytes_per_s


def _fit(schedule: Schedule, budget_bytes: int | None, can_use_host: bool) -> Plan:
    """Put buffers out until the arena is within the budget, or nothing is left to put out."""
    if budget_bytes is None or not can_use_host:
        return _placed(schedule, ["kept"] * len(schedule.buffers))
    residents, target_bytes = Residents(schedule), budget_bytes
    while True:
        residents.put_out(target_bytes)
        plan = _placed(schedule, residents.stays)
        if plan.arena_bytes <= budget_bytes or target_bytes <= 0 or set(plan.stays) == {"out"}:
            return plan
        target_bytes -= max(ALIGNMENT_BYTES, plan.arena_bytes - budget_bytes)


def _placed(schedule: Schedule, stays: list[Stay]) -> Plan:
    """Give a place to every time that a buffer spends on the device."""
    windows: list[Buffer] = []
    owners: list[tuple[int, int | None]] = []
    for index, (buffer, stay) in enumerate(zip(schedule.buffers, stays, strict=True)):
        if stay == "kept":
            windows.append(buffer)
            owners.append((index, None))
        elif stay == "swapped" and buffer.pause is not None:
            before, after = buffer.pause
            windows.append(Buffer(buffer.name, buffer.n_bytes, buffer.first, before))
            windows.append(Buffer(buffer.name, buffer.n_bytes, after, buffer.last))
            owners += [(index, None), (index, after)]
    offsets, arena_bytes = place(windows)
    plan = Plan(schedule, stays, [None] * len(stays), {}, arena_bytes)
    for offset, (index, resumed_at) in zip(offsets, owners, strict=True):
        if resumed_at is None:
            plan.offsets[index] = offset
        else:
            plan.resumed[index] = Resumption(resumed_at, offset)
    return plan


class Residents:
    """Who is on the device during which action, as one buffer after another is put out."""

    def __init__(self, schedule: Schedule) -> None:
        buffers = schedule.buffers
        pauses = [buffer.pause or (0, 0) for buffer in buffers]  # the latter has no inside
        columns = [
            (b.n_bytes, b.first, b.last, *pause, len(b.touches))
            for b, pause in zip(buffers, pauses, strict=True)
        ]
        table = np.array(columns, np.int64).reshape(len(buffers), 6).T
        self._n_bytes, self._first, self._last, self._before, self._after, self._touches = table
        self._live = np.array(schedule.live_bytes(), np.int64)
        self._is_swapped, self._is_out = np.zeros((2, len(buffers)), bool)

    @property
    def stays(self) -> list[Stay]:
        """Return the stay of each buffer."""
        pairs = zip(self._is_out.tolist(), self._is_swapped.tolist(), strict=True)
        return ["out" if out else "swapped" if swapped else "kept" for out, swapped in pairs]

    def put_out(self, target_bytes: int) -> None:
        """Change stays until at no action more than `target_bytes` are alive on the device.

        At the fullest action goes what has the least traffic per byte, then the longest life;
        then what goes for good before what comes back, then the first.
        """
        while self._live.size and self._live.max() > target_bytes:
            peak = int(self._live.argmax())
            in_pause = (self._before < peak) & (peak < self._after)
            alive = (self._first <= peak) & (peak <= self._last) & ~self._is_out
            [choices] = np.nonzero(alive & ~(in_pause & self._is_swapped))
            if not choices.size:
                return
            swaps = in_pause[choices]
            traffic = np.where(swaps, _SWAP_TRAFFIC, self._touches[choices])
            life = self._last[choices] - self._first[choices]
            best = np.lexsort((swaps, -life, traffic))[0]
            self._change(int(choices[best]), to_swapped=bool(swaps[best]))

    def _change(self, i: int, *, to_swapped: bool) -> None:
        first, last, before, after = (
            int(column[i]) for column in (self._first, self._last, self._before, self._after)
        )
        if to_swapped:
            freed = [(before + 1, after)]
        elif self._is_swapped[i]:
            freed = [(first, before + 1), (after, last + 1)]
        else:
            freed = [(first, last + 1)]
        for start, stop in freed:
            self._live[start:stop] -= self._n_bytes[i]
        self._is_swapped[i], self._is_out[i] = to_swapped, not to_swapped


def place(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """Return an offset for each buffer, and the end of the last.

    Largest first, each at the lowest offset where it meets no other that is alive when it is.
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    end_bytes = 0
    for index in sorted(range(len(buffers)), key=lambda i: -buffers[i].n_bytes):
        buffer = buffers[index]
        size_bytes = -(-buffer.n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        taken = sorted(
            (offsets[j], offsets[j] + buffers[j].n_bytes)
            for j in placed
            if buffers[j].first <= buffer.last and buffer.first <= buffers[j].last
        )
        offset = 0
        for start, stop in taken:
            if start - offset >= size_bytes:
                break
            offset = max(offset, -(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        offsets[index] = offset
        placed.append(index)
        end_bytes = max(end_bytes, offset + size_bytes)
    return offsets, end_bytes
