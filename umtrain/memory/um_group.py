"""Unified memory with group execution: backward faults in a whole group when it reaches it."""

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn

from umtrain.memory.group_tracker import GroupTracker
from umtrain.memory.layout import Layout
from umtrain.memory.paging import Paged, Pager
from umtrain.memory.saved import Moved, Mover
from umtrain.memory.um import UnifiedMemory
from umtrain.memory.working_set import WorkingSets


class GroupBlock(Moved):
    """A paged tensor, entered in every group that saved it: those that read it in backward."""

    def __init__(self, mover: "GroupMover", paged: Paged) -> None:
        self._mover = mover
        self.paged = paged

    def saved_again(self) -> None:
        """Let the group that runs now read these bytes in backward too."""
        self._mover.enter(self)

    def load(self, layout: Layout) -> torch.Tensor:
        """Return the tensor, from wherever its pages are."""
        self._mover.before_reading()
        return self.paged.load(layout)


class GroupMover(Mover):
    """Sorts what a pager moves into groups; faults a group in when backward enters it."""

    def __init__(self, pager: Pager, tracker: GroupTracker) -> None:
        self.pager = pager
        self.tracker = tracker
        self._blocks: list[list[weakref.ref[GroupBlock]]] = []
        tracker.on_backward_entry = self.page_in

    @property
    def is_needed(self) -> bool:
        """See `Mover`."""
        return self.pager.is_needed

    def start_step(self) -> None:
        """Forget the blocks of the step before."""
        self._blocks = [[] for _ in self.tracker.groups]

    def wants(self, tensor: torch.Tensor) -> bool:
        """See `Mover`."""
        return self.pager.wants(tensor)

    def move(self, tensor: torch.Tensor, layout: Layout) -> GroupBlock:
        """Move `tensor` as a block of the group that runs now."""
        block = GroupBlock(self, self.pager.move(tensor, layout))
        self.enter(block)
        return block

    def enter(self, block: GroupBlock) -> None:
        """Enter `block` among those of the group that runs now."""
        self._blocks[self.tracker.current].append(weakref.ref(block))

    def blocks_of(self, group: int) -> list[Paged]:
        """Return what is left of a group, in the order backward reads it: last saved first."""
        alive = (reference() for reference in reversed(self._blocks[group]))
        return [block.paged for block in alive if block is not None]

    def page_in(self, group: int) -> None:
        """Fault a whole group in."""
        self.pager.page_in(self.tracker.groups[group].name, self.blocks_of(group))

    def before_reading(self) -> None:
        """Do what is due before backward reads a tensor of the current group."""


class GroupedUnifiedMemory(UnifiedMemory):
    """`um`, with backward executed group by group (the talk's "group execution")."""

    name: ClassVar[str] = "um_group"
    _mover: GroupMover

    def _create_mover(self, model: nn.Module, measured: WorkingSets) -> Mover:
        super()._create_mover(model, measured)
        return self._create_group_mover()

    def _create_group_mover(self) -> GroupMover:
        return GroupMover(self._pager, self._tracker)

    @contextmanager
    def _around_step(self) -> Generator[None]:
        self._mover.start_step()
        with super()._around_step():
            yield
