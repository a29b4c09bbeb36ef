"""Unified memory, grouped, with eager outward swapping and prefetch of the next groups.

What HMS, aetherAI's system, does on a GPU: a group goes out as soon as nothing in the forward
pass reads it any more, and comes back while backward is busy with the groups after it. What the
device can hold of the end of the forward pass stays, as backward starts there.
"""

from collections.abc import Sequence
from typing import ClassVar

from umtrain.memory.group_tracker import GroupTracker
from umtrain.memory.grouping import Group
from umtrain.memory.paging import Pager
from umtrain.memory.um_group import GroupedUnifiedMemory, GroupMover


class PrefetchingMover(GroupMover):
    """Starts migrations of groups at the moments the schedule gives them."""

    def __init__(self, pager: Pager, tracker: GroupTracker, depth: int) -> None:
        super().__init__(pager, tracker)
        self._depth = depth
        self._tail_bytes = saved_bytes_from(tracker.groups)
        self._resident: list[int] = []
        tracker.on_forward_entry = self._forward_entered

    def start_step(self) -> None:
        """Begin with every group on the device."""
        super().start_step()
        self._resident = []

    def _forward_entered(self, group: int) -> None:
        """Take out the groups that forward has left, but for the end that may stay."""
        left = [g for g in (*self._resident, group - 1) if 0 <= g != group]
        self._resident = [g for g in dict.fromkeys(left) if not self._take_out(g)]

    def _take_out(self, group: int) -> bool:
        """Begin to evict `group`; False if some of it has still to be read in forward."""
        room_bytes = self.pager.room_bytes()
        if room_bytes is None or self._tail_bytes[group] <= room_bytes:
            return True
        blocks = self.blocks_of(group)
        ready = [block for block in blocks if not block.has_forward_reader]
        self.pager.evict(self.tracker.groups[group].name, ready)
        return len(ready) == len(blocks)

    def before_reading(self) -> None:
        """Keep the groups that backward enters next coming, as room for them appears."""
        group = self.tracker.current
        for ahead in range(group - 1, max(-1, group - 1 - self._depth), -1):
            self.pager.prefetch(self.tracker.groups[ahead].name, self.blocks_of(ahead))


def saved_bytes_from(groups: Sequence[Group]) -> list[int]:
    """Return, for each group, the bytes saved by it and all groups after it."""
    tail: dict[int, int] = {}
    totals: list[int] = []
    for group in reversed(groups):
        for layer in group.layers:
            tail |= layer.saved
        totals.append(sum(tail.values()))
    return totals[::-1]


class PrefetchedUnifiedMemory(GroupedUnifiedMemory):
    """`um_group`, with migrations started ahead of use, so that they overlap with compute."""

    name: ClassVar[str] = "um_group_prefetch"

    def _create_group_mover(self) -> GroupMover:
        return PrefetchingMover(self._pager, self._tracker, self.options.prefetch_depth)
