"""Strategies that work through saved-tensor hooks."""

from abc import abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from umtrain.memory.base import Strategy
from umtrain.memory.saved import Mover, SavedTensors


class HookedStrategy(Strategy):
    """Moves what autograd saves; the model itself is untouched."""

    smallest_bytes = 64 * 1024
    _saved: SavedTensors

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        mover = self._create_mover(model, sample_batch)
        self._saved = SavedTensors(self.name, model, mover, self.smallest_bytes)
        return model

    @abstractmethod
    def _create_mover(self, model: nn.Module, sample_batch: Any) -> Mover:
        """Return what moves saved tensors; what has to be undone goes on `self._cleanup`."""

    @contextmanager
    def _around_step(self) -> Generator[None]:
        # One thread: see Note: [Callbacks under the allocator's lock].
        with self._saved.hooks(), torch.autograd.set_multithreading_enabled(False):
            yield
