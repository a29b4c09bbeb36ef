"""lms and vdnn, played through: copies out and in on a link of its own, beside compute.

The rules are those of `umtrain.memory.swap.Swapper`: a tensor goes out when it is saved and leaves
the device once its copy is done; tensors come back in the reverse order of their last save, a
window of bytes ahead of the reader; compute waits where a copy is late.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from umtrain.planning.step import Allocation, StepTrace
from umtrain.planning.usage import Stay, Usage, stay_of, step_allocations

# Whether an allocation goes, at which of its saves; None keeps it.
Choice = Callable[[Allocation], int | None]


@dataclass(frozen=True)
class Link:
    """The way to host memory and back, bytes/s; both ways run at the same time.

    What comes back takes `lead_bytes` more than it was, to lie as direct I/O wants it.
    """

    out_bytes_per_s: float
    in_bytes_per_s: float
    lead_bytes: int = 0


@dataclass(frozen=True)
class Launching:
    """A host that runs ahead of its GPU, and its seconds for an operation and for a transfer."""

    operation_s: float
    transfer_s: float


@dataclass
class _Copy:
    """A swapped tensor: when it is out, when it is asked for and when it is back."""

    allocation: Allocation
    moved_at: int
    out_s: float = 0.0
    is_out: bool = False
    asked_at: int | None = None
    in_s: float = 0.0
    is_back: bool = False
    left_at: int = 0


@dataclass
class _Swap:
    trace: StepTrace
    link: Link
    window_bytes: int
    launching: Launching | None = None
    now_s: float = 0.0
    host_s: float = 0.0
    stall_s: float = 0.0
    out_free_s: float = 0.0
    in_free_s: float = 0.0
    outgoing: deque[_Copy] = field(default_factory=deque)
    outgoing_bytes: int = 0

    def start_out(self, copy: _Copy, position: int) -> None:
        """Queue a copy out; wait if too much is on its way already."""
        self.finish_out(self.window_bytes, position)
        self._transfer()
        self.out_free_s = max(self.now_s, self.out_free_s)
        self.out_free_s += copy.allocation.n_bytes / self.link.out_bytes_per_s
        copy.out_s = self.out_free_s
        self.outgoing.append(copy)
        self.outgoing_bytes += copy.allocation.n_bytes

    def finish_out(self, allowed_bytes: int, position: int) -> None:
        """Let go of what is out; wait until at most `allowed_bytes` are on their way."""
        while self.outgoing:
            oldest = self.outgoing[0]
            if oldest.out_s > self._seen_s:
                if self.outgoing_bytes <= allowed_bytes:
                    return
                self.wait_until(oldest.out_s)
            self.outgoing.popleft()
            self.outgoing_bytes -= oldest.allocation.n_bytes
            oldest.is_out, oldest.left_at = True, position

    def wait_until(self, time_s: float) -> None:
        """Let compute wait."""
        self.stall_s += max(0.0, time_s - self.now_s)
        self.now_s = max(self.now_s, time_s)

    def compute(self, operation_s: float) -> None:
        """Let an operation run, once it is launched."""
        if self.launching is not None:
            self._launch(self.launching.operation_s)
        self.now_s += operation_s

    def _transfer(self) -> None:
        if self.launching is not None:
            self._launch(self.launching.transfer_s)

    def _launch(self, launch_s: float) -> None:
        """Let the host be busy, and a GPU wait for it if it has nothing else to do."""
        self.host_s += launch_s
        self.now_s = max(self.now_s, self.host_s)

    @property
    def _seen_s(self) -> float:
        """Return up to when it is known what is out: a host that launches is ahead of its GPU."""
        return self.now_s if self.launching is None else self.host_s

    def start_in(self, copy: _Copy, position: int) -> None:
        """Queue a copy in, unless it was, or the tensor has not left."""
        if not copy.is_out or copy.asked_at is not None:
            return
        copy.asked_at = position
        self._transfer()
        self.in_free_s = max(self.now_s, self.in_free_s)
        self.in_free_s += copy.allocation.n_bytes / self.link.in_bytes_per_s
        copy.in_s = self.in_free_s


def swapped(
    trace: StepTrace,
    seconds: Sequence[float],
    link: Link,
    goes: Choice,
    window_bytes: int,
    ends_with_layer: Callable[[int], bool] = lambda position: False,
    launching: Launching | None = None,
) -> Usage:
    """Return the usage of a step that swaps what `goes` chooses.

    `seconds` are those of each operation; after the forward operations for which
    `ends_with_layer` is true, compute waits until everything is out. A host that runs ahead, by
    `launching`, asks that much earlier what is out; `seconds` are then the kernels' alone, and
    `extra_s` is what these wait for it.
    """
    swap = _Swap(trace, link, window_bytes, launching)
    allocations = step_allocations(trace)
    copies = [
        _Copy(allocation, moved_at)
        for allocation in allocations
        if (moved_at := goes(allocation)) is not None
    ]
    schedule = sorted(copies, key=lambda c: (c.allocation.saves[-1].at, c.allocation.first))
    place = {id(copy): position for position, copy in enumerate(schedule)}
    moving, reading = _calendar(copies, len(trace.operations))
    for position, operation_s in enumerate(seconds):
        for copy in moving[position]:
            swap.start_out(copy, position)
        for copy in reading[position]:
            _bring_in(swap, copy, schedule, place[id(copy)], position)
        swap.compute(operation_s)
        if position < trace.n_forward and ends_with_layer(position):
            swap.finish_out(0, position)
    stays = [stay_of(a) for a in allocations if goes(a) is None]
    for copy in copies:
        stays += _stays(copy, link.lead_bytes, len(trace.operations) - 1)
    in_bytes = sum(copy.allocation.n_bytes for copy in copies if copy.asked_at is not None)
    total_bytes = sum(copy.allocation.n_bytes for copy in copies)
    return Usage(
        trace,
        stays,
        host_peak_bytes=total_bytes,
        out_bytes=total_bytes,
        in_bytes=in_bytes,
        stall_s=swap.stall_s,
        extra_s=max(0.0, swap.now_s - sum(seconds) - swap.stall_s),
    )


def _calendar(
    copies: Sequence[_Copy], n_operations: int
) -> tuple[list[list[_Copy]], list[list[_Copy]]]:
    """Return, for each operation, what is saved before it and what it reads back."""
    moving: list[list[_Copy]] = [[] for _ in range(n_operations)]
    reading: list[list[_Copy]] = [[] for _ in range(n_operations)]
    for copy in copies:
        moving[min(copy.moved_at, n_operations - 1)].append(copy)
        for position in copy.allocation.needed:
            reading[position].append(copy)
    return moving, reading


def _bring_in(
    swap: _Swap, copy: _Copy, schedule: Sequence[_Copy], place: int, position: int
) -> None:
    if copy.is_back or not copy.is_out:
        return
    swap.start_in(copy, position)
    swap.finish_out(swap.window_bytes, position)
    swap.wait_until(copy.in_s)
    copy.is_back = True
    ahead_bytes = 0
    for following in reversed(schedule[:place]):
        ahead_bytes += following.allocation.n_bytes
        if ahead_bytes > swap.window_bytes:
            return
        swap.start_in(following, position)


def _stays(copy: _Copy, lead_bytes: int, end: int) -> list[Stay]:
    allocation = copy.allocation
    if not copy.is_out:
        return [Stay(allocation.n_bytes, allocation.first, end)]
    until = allocation.saved_until or allocation.first
    first = Stay(allocation.n_bytes, allocation.first, max(until, copy.left_at))
    if copy.asked_at is None:
        return [first]
    room_bytes = allocation.n_bytes + lead_bytes
    return [first, Stay(room_bytes, copy.asked_at, max(copy.asked_at, allocation.last))]
