"""Strategies that work through saved-tensor hooks."""

from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from umtrain.memory.base import Strategy
from umtrain.memory.group_tracker import GroupTracker
from umtrain.memory.grouping import Group, make_groups
from umtrain.memory.saved import Mover, SavedTensors
from umtrain.memory.working_set import WorkingSets, measure_working_sets

# A file is read and written by system calls; a GPU also records and waits for events.
SMALLEST_MOVED_BYTES = {"cpu": 64 * 1024, "cuda": 2**20}


class HookedStrategy(Strategy):
    """Moves what autograd saves; the model itself is untouched."""

    groups: Sequence[Group]
    _tracker: GroupTracker
    _mover: Mover
    _saved: SavedTensors

    @property
    def smallest_bytes(self) -> int:
        """Return from what size on tensors are moved; smaller ones cost more than they free."""
        return SMALLEST_MOVED_BYTES[self.options.device]

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        measured = measure_working_sets(model, sample_batch)
        self.groups = make_groups(model, measured, self.options)
        self._tracker = GroupTracker(model, self.groups, self.trace)
        self._cleanup.callback(self._tracker.attach())
        self._mover = self._create_mover(model, measured)
        self._saved = SavedTensors(
            self.name, model, self._mover, self._tracker, self.smallest_bytes
        )
        return model

    @abstractmethod
    def _create_mover(self, model: nn.Module, measured: WorkingSets) -> Mover:
        """Return what moves saved tensors; what has to be undone goes on `self._cleanup`."""

    @contextmanager
    def _around_step(self) -> Generator[None]:
        self._tracker.start_step()
        # Without hooks nothing sees which group backward reads, as a timeline shows it.
        is_followed = self._mover.is_needed or self.options.trace is not None
        # One thread: see Note: [Callbacks under the allocator's lock].
        with (
            self._saved.hooks() if is_followed else nullcontext(),
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield
        self._tracker.end_step()
