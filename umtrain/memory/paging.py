"""What the unified-memory strategies ask of a tier: saved tensors on pages that migrate."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from umtrain.memory.budget import DeviceBudget
from umtrain.memory.layout import Layout
from umtrain.memory.saved import Moved, Mover


class Paged(Moved):
    """A saved tensor on pages of its own; it may be read wherever they are."""

    n_bytes: int

    @property
    @abstractmethod
    def has_forward_reader(self) -> bool:
        """Return whether the forward pass can still read these very pages."""


class Pager(Mover):
    """Migrates pages between the tiers, on demand and ahead of it."""

    def around_step(self) -> AbstractContextManager[None]:
        """Return the context that forward and backward run in."""
        return nullcontext()

    def begin(self, budget: DeviceBudget) -> None:
        """Take note of the budget that holds in all steps to come."""
        return

    @abstractmethod
    def move(self, tensor: torch.Tensor, layout: Layout) -> Paged:
        """Put the span of storage that `tensor` uses on pages of its own."""

    @abstractmethod
    def page_in(self, name: str, blocks: Sequence[Paged]) -> None:
        """Bring blocks into device memory and wait for them."""

    @abstractmethod
    def prefetch(self, name: str, blocks: Sequence[Paged]) -> None:
        """Begin to bring blocks into device memory, as far as there is room."""

    @abstractmethod
    def evict(self, name: str, blocks: Sequence[Paged]) -> None:
        """Begin to take blocks out to host memory."""

    @abstractmethod
    def room_bytes(self) -> int | None:
        """Return what device memory can hold of saved tensors; None without a budget."""

    @abstractmethod
    def close(self) -> None:
        """End the migrations in flight."""
