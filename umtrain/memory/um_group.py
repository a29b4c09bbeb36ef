"""Unified memory with group execution: backward faults in a whole group when it reaches it."""

import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from umtrain.memory.group_tracker import GroupTracker
from umtrain.memory.grouping import Group, make_groups
from umtrain.memory.layout import Layout
from umtrain.memory.paging import Paged, Pager
from umtrain.memory.saved import Moved, Mover
from umtrain.memory.um import UnifiedMemory
from umtrain.memory.working_set import measure_working_sets


class GroupBlock(Moved):
    """A paged tensor that knows the groups that saved it: those that read it in backward."""

    def __init__(self, mover: "GroupMover", paged: Paged, group: int) -> None:
        self._mover = mover
        self.paged = paged
        self._readers = [group]

    def saved_again(self) -> None:
        """Let the group that runs now read these bytes in backward too."""
        group = self._mover.tracker.current
        self._readers.append(group)
        self._mover.note(self, group)

    def load(self, layout: Layout) -> torch.Tensor:
        """Return the tensor; backward reads in the reverse order of saving, group by group."""
        group = self._readers[-1]
        if len(self._readers) > 1:
            self._readers.pop()
        self._mover.before_reading(group)
        return self.paged.load(layout)


class GroupMover(Mover):
    """Sorts what a pager moves into groups, and pages whole groups in."""

    def __init__(self, pager: Pager, tracker: GroupTracker) -> None:
        self.pager = pager
        self.tracker = tracker
        self._blocks: list[list[weakref.ref[GroupBlock]]] = []

    def start_step(self) -> None:
        """Forget the blocks of the step before."""
        self._blocks = [[] for _ in self.tracker.groups]

    def wants(self, tensor: torch.Tensor) -> bool:
        """See `Mover`."""
        return self.pager.wants(tensor)

    def move(self, tensor: torch.Tensor, layout: Layout) -> GroupBlock:
        """Move `tensor` as a block of the group that runs now."""
        paged = self.pager.move(tensor, layout)
        block = GroupBlock(self, paged, self.tracker.current)
        self.note(block, self.tracker.current)
        return block

    def note(self, block: GroupBlock, group: int) -> None:
        """Enter `block` among those of `group`."""
        self._blocks[group].append(weakref.ref(block))

    def blocks_of(self, group: int) -> list[Paged]:
        """Return what is left of a group, in the order backward reads it: last saved first."""
        alive = (reference() for reference in reversed(self._blocks[group]))
        return [block.paged for block in alive if block is not None]

    def before_reading(self, group: int) -> None:
        """Fault the whole group in when backward reaches it."""
        if self.tracker.backward_reached(group):
            self.pager.page_in(self.tracker.groups[group].name, self.blocks_of(group))


class GroupedUnifiedMemory(UnifiedMemory):
    """`um`, with backward executed group by group (the talk's "group execution")."""

    name: ClassVar[str] = "um_group"
    groups: Sequence[Group]

    def _create_mover(self, model: nn.Module, sample_batch: Any) -> Mover:
        measured = measure_working_sets(model, sample_batch)
        self.groups = make_groups(model, measured, self.options)
        self._pager = self._create_pager(measured)
        self._cleanup.callback(self._pager.close)
        self._tracker = GroupTracker(model, self.groups, self.trace)
        self._cleanup.callback(self._tracker.attach())
        self._mover = self._create_group_mover()
        return self._mover

    def _create_group_mover(self) -> GroupMover:
        return GroupMover(self._pager, self._tracker)

    @contextmanager
    def _around_step(self) -> Generator[None]:
        self._tracker.start_step()
        self._mover.start_step()
        with super()._around_step():
            yield
        self._tracker.end_step()
