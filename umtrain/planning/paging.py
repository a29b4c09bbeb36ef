"""Unified memory, played through: pages that come on demand, in groups, or ahead of use.

Saved tensors are on pages; all else stays. Whoever needs room takes it from the block that was
touched longest ago. On demand compute waits for every page, fault batch by fault batch; a group
that is paged in whole comes at the link's speed; what is prefetched comes beside compute.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from umtrain.planning.profile import Profile
from umtrain.planning.step import Allocation, StepTrace
from umtrain.planning.usage import Stay


class PageTable:
    """How much of each block is in device memory, least recently touched first."""

    def __init__(self) -> None:
        self._resident: OrderedDict[int, int] = OrderedDict()
        self.resident_bytes = 0

    def in_bytes(self, block: int) -> int:
        """Return how much of a block is in."""
        return self._resident.get(block, 0)

    def touch(self, block: int, n_bytes: int, room_bytes: int) -> tuple[int, dict[int, int]]:
        """Bring all of a block in; return the bytes that were not, and what others lost for it.

        A block larger than the room passes through it, and its last part stays.
        """
        missing_bytes = n_bytes - self.in_bytes(block)
        self._put(block, min(n_bytes, max(0, room_bytes)))
        self._resident.move_to_end(block)
        return missing_bytes, self.shrink(room_bytes)

    def shrink(self, room_bytes: int) -> dict[int, int]:
        """Take out what has not been touched for longest, until the rest fits; return how much."""
        lost: dict[int, int] = {}
        for block in list(self._resident):
            excess_bytes = self.resident_bytes - max(0, room_bytes)
            if excess_bytes <= 0:
                break
            left_bytes = self._resident[block]
            lost[block] = min(left_bytes, excess_bytes)
            self._put(block, left_bytes - lost[block])
        return lost

    def drop(self, block: int) -> int:
        """Forget a block; return how much of it was in."""
        n_bytes = self._resident.pop(block, 0)
        self.resident_bytes -= n_bytes
        return n_bytes

    def _put(self, block: int, n_bytes: int) -> None:
        self.resident_bytes += n_bytes - self.in_bytes(block)
        self._resident[block] = n_bytes


@dataclass(frozen=True)
class Grouped:
    """The group of each operation, -1 before the first, and how many are asked for ahead.

    `n_ahead` is None where groups are paged in when backward enters them, not before.
    """

    of_operation: Sequence[int]
    n_ahead: int | None = None


@dataclass
class Migrations:
    """What moved, and what compute waited for."""

    out_bytes: int = 0
    in_bytes: int = 0
    stall_s: float = 0.0
    host_peak_bytes: int = 0
    pages: list[Stay] = field(default_factory=list)


@dataclass
class _Block:
    allocation: Allocation
    group: int
    is_written: bool = False
    ready_s: float = 0.0
    is_out: bool = False
    keeps_copy: bool = False


class Pager:
    """Plays a step through, operation by operation."""

    def __init__(
        self,
        trace: StepTrace,
        blocks: Sequence[Allocation],
        room_bytes: Sequence[int],
        profile: Profile,
        groups: Grouped | None = None,
    ) -> None:
        self._trace, self._room_bytes, self._profile, self._groups = (
            trace,
            room_bytes,
            profile,
            groups,
        )
        self._table = PageTable()
        self._moved = Migrations()
        self._now_s = self._out_free_s = self._in_free_s = 0.0
        self._blocks = [_Block(a, self._group_at(a.saves[-1].at)) for a in blocks]
        self._touching = self._by_position(lambda a: (a.saves[0].at, *a.needed))
        self._ending = self._by_position(lambda a: (a.last,))
        self._last_group = -1
        self._held_bytes = 0
        self._tail_bytes = self._bytes_from_each_group()

    def run(self, seconds: Sequence[float]) -> Migrations:
        """Return what moves in a step whose operations take `seconds`."""
        for position, operation_s in enumerate(seconds):
            self._enter_group(position)
            for index in self._touching[position]:
                self._touch(index, position)
            self._evict(self._table.shrink(self._room_bytes[position]), waits=True)
            self._now_s += operation_s
            for index in self._ending[position]:
                self._table.drop(index)
                self._held_bytes -= self._blocks[index].allocation.n_bytes
        self._moved.pages = list(self._stays())
        return self._moved

    def _stays(self) -> Iterator[Stay]:
        """Yield when each block is mapped: managed memory always, a file once backward reads it."""
        for block in self._blocks:
            allocation = block.allocation
            if self._profile.kind == "cuda":
                yield Stay(allocation.n_bytes, allocation.first, allocation.last)
            elif allocation.needed:
                yield Stay(allocation.n_bytes, allocation.needed[0], allocation.last)

    def _by_position(self, when: Callable[[Allocation], Sequence[int]]) -> list[list[int]]:
        n_operations = len(self._trace.operations)
        found: list[list[int]] = [[] for _ in range(n_operations)]
        for index, block in enumerate(self._blocks):
            for position in dict.fromkeys(when(block.allocation)):
                found[min(position, n_operations - 1)].append(index)
        return found

    def _group_at(self, position: int) -> int:
        if self._groups is None:
            return -1
        of_operation = self._groups.of_operation
        return of_operation[min(position, len(of_operation) - 1)]

    def _touch(self, index: int, position: int) -> None:
        """Have a block in: written for the first time, or read in backward."""
        block, n_bytes = self._blocks[index], self._blocks[index].allocation.n_bytes
        missing_bytes, lost = self._table.touch(index, n_bytes, self._room_bytes[position])
        self._evict(lost, waits=True)
        if not block.is_written:
            block.is_written = True
            self._held_bytes += n_bytes
            self._moved.host_peak_bytes = max(self._moved.host_peak_bytes, self._held_bytes)
            return
        self._wait_until(block.ready_s)
        if missing_bytes and block.is_out:
            self._moved.in_bytes += missing_bytes
            self._wait_until(self._now_s + self._demand_s(missing_bytes))

    def _enter_group(self, position: int) -> None:
        """Do what is due when forward or backward gets to another group."""
        group = self._group_at(position)
        if self._groups is None or group < 0:
            return
        is_new, self._last_group = group != self._last_group, group
        n_ahead = self._groups.n_ahead
        if position < self._trace.n_forward:
            if is_new and n_ahead is not None:
                self._send_out(group, position)
            return
        if is_new:
            self._page_in(group, position)
        for ahead in range(1, (n_ahead or 0) + 1):
            self._prefetch(group - ahead, position)

    def _send_out(self, group: int, position: int) -> None:
        """Evict the groups that forward has left, but for the end that may stay."""
        room_bytes = self._room_bytes[position]
        for index, block in enumerate(self._blocks):
            is_left = block.is_written and block.group < group and block.group >= 0
            if is_left and self._tail_bytes[block.group] > room_bytes:
                self._evict({index: self._table.drop(index)}, waits=False)

    def _bytes_from_each_group(self) -> dict[int, int]:
        """Return the bytes saved by each group and all groups after it."""
        total, found = 0, {}
        for block in sorted(self._blocks, key=lambda b: -b.group):
            total += block.allocation.n_bytes
            found[block.group] = total
        return found

    def _page_in(self, group: int, position: int) -> None:
        """Bring a group in and wait for it."""
        self._start_in(group, position, evicts=True)
        for block in self._blocks:
            if block.group == group:
                self._wait_until(block.ready_s)

    def _prefetch(self, group: int, position: int) -> None:
        self._start_in(group, position, evicts=False)

    def _start_in(self, group: int, position: int, *, evicts: bool) -> None:
        room_bytes = self._room_bytes[position]
        for index in reversed(range(len(self._blocks))):
            block = self._blocks[index]
            missing_bytes = block.allocation.n_bytes - self._table.in_bytes(index)
            is_wanted = block.group == group and block.is_out and missing_bytes > 0
            if not is_wanted or block.allocation.last < position:
                continue
            if not evicts and self._table.resident_bytes + missing_bytes > room_bytes:
                return
            _, lost = self._table.touch(index, block.allocation.n_bytes, room_bytes)
            self._evict(lost, waits=True)
            self._in_free_s = max(self._now_s, self._in_free_s)
            self._in_free_s += missing_bytes / self._profile.in_bytes_per_s
            block.ready_s = self._in_free_s
            self._moved.in_bytes += missing_bytes

    def _evict(self, lost: dict[int, int], *, waits: bool) -> None:
        """Take bytes of blocks out; a file keeps its copy, so that the second time is free."""
        for index, n_bytes in lost.items():
            block = self._blocks[index]
            if not n_bytes:
                continue
            block.is_out = True
            self._moved.out_bytes += n_bytes
            if self._profile.kind == "cpu" and block.keeps_copy:
                continue
            block.keeps_copy = True
            self._out_free_s = max(self._now_s, self._out_free_s)
            self._out_free_s += n_bytes / self._profile.out_bytes_per_s
        if waits and lost:
            self._wait_until(self._out_free_s)

    def _wait_until(self, time_s: float) -> None:
        self._moved.stall_s += max(0.0, time_s - self._now_s)
        self._now_s = max(self._now_s, time_s)

    def _demand_s(self, n_bytes: int) -> float:
        """Return how long pages take that nobody asked for ahead."""
        migration = self._profile.migration
        batch_bytes = migration.block_bytes * migration.n_faults
        n_batches = -(-n_bytes // max(1, batch_bytes))
        return n_bytes / self._profile.in_bytes_per_s + n_batches * migration.fault_s
