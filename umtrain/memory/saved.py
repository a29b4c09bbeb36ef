"""Saved-tensor hooks: which tensors of a step leave device memory, and how they come back.

# Note: [One storage, saved many times]
# A feature map is saved by the op that made it and by each op that reads it. It is moved once.
# Its address is no identity: once freed, the next map gets it, and the gradients would be wildly
# wrong. The key is the storage object, which a weak reference keeps from being reused.

# Note: [Changed after it was saved]
# Autograd checks versions only of tensors it keeps itself. With hooks the check is ours: a saved
# tensor that was changed in place makes backward fail, as it does in ordinary training.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from umtrain.errors import ConfigError
from umtrain.memory.group_tracker import GroupTracker
from umtrain.memory.layout import Layout
from umtrain.memory.tensors import model_storages

_Key = tuple[int, int, int, int]
_refer_weakly: Callable[[torch.UntypedStorage], Any] = StorageWeakRef


class Moved(ABC):
    """The bytes of one storage span, wherever they are; it lives as long as backward needs it."""

    @abstractmethod
    def load(self, layout: Layout) -> torch.Tensor:
        """Return the tensor that has `layout` on these bytes, in device memory."""

    def saved_again(self) -> None:
        """Take note that one more operation of the forward pass saved the same bytes."""
        return


class Mover(ABC):
    """Puts saved tensors somewhere else."""

    @property
    def is_needed(self) -> bool:
        """Return whether a step may have to move anything; if not, it can do without hooks."""
        return True

    @abstractmethod
    def wants(self, tensor: torch.Tensor) -> bool:
        """Return whether this tensor is to be moved at all."""

    @abstractmethod
    def move(self, tensor: torch.Tensor, layout: Layout) -> Moved:
        """Move the span of storage that `tensor` uses."""


class _Handle:
    """What autograd holds for a saved tensor: the tensor itself, or where it went."""

    def __init__(self, tensor: torch.Tensor, group: int) -> None:
        self.group = group
        self._version = tensor._version
        self._source = TensorWeakRef(tensor)
        self._kept: torch.Tensor | None = tensor.detach()
        self._moved: tuple[Moved, Layout] | None = None

    def follow(self, moved: Moved, layout: Layout) -> None:
        """Let go of the tensor: its storage was moved."""
        self._moved = (moved, layout)
        self._kept = None

    def load(self) -> torch.Tensor:
        """Return the saved tensor; raises RuntimeError if it was changed since."""
        source = self._source() if self._kept is None else self._kept
        if source is not None and source._version != self._version:
            raise RuntimeError(_changed_text(source, self._version))
        if self._kept is not None:
            return self._kept
        assert self._moved is not None
        moved, layout = self._moved
        return moved.load(layout)


def _changed_text(tensor: torch.Tensor, version: int) -> str:
    return (
        "one of the variables needed for gradient computation has been modified by an "
        f"inplace operation: {tensor.dtype} {tuple(tensor.shape)} is at version "
        f"{tensor._version}; expected version {version} instead"
    )


@dataclass
class _Sharing:
    """The handles that share one storage span."""

    storage: Any
    moved: Callable[[], Moved | None] = lambda: None
    keeping: list[tuple["weakref.ref[_Handle]", Layout]] = field(default_factory=list)


class SavedTensors:
    """The pack and unpack hooks of one strategy."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        mover: Mover,
        tracker: GroupTracker,
        smallest_bytes: int,
    ) -> None:
        self._name = name
        self._tracker = tracker
        self._model = model
        self._mover = mover
        self._smallest_bytes = smallest_bytes
        self._resting: dict[int, int] = {}
        self._sharing: dict[_Key, _Sharing] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return the context to run forward and backward in."""
        self._resting = model_storages(self._model)
        self._sharing.clear()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> _Handle:
        handle = _Handle(tensor, self._tracker.current)
        if not self._is_movable(tensor):
            return handle
        layout = Layout.of(tensor)
        start_bytes = int(tensor.storage_offset()) * tensor.element_size()
        storage = tensor.untyped_storage()
        key = (int(storage._cdata), tensor._version, start_bytes, layout.span_bytes)
        sharing = self._sharing.get(key)
        if sharing is None or sharing.storage.expired():
            sharing = self._sharing[key] = _Sharing(_refer_weakly(storage))
        self._share(sharing, handle, tensor, layout)
        return handle

    def _share(
        self, sharing: "_Sharing", handle: _Handle, tensor: torch.Tensor, layout: Layout
    ) -> None:
        """Give `handle` the moved bytes; earlier handles that kept the tensor follow."""
        moved = sharing.moved()
        if moved is not None:
            moved.saved_again()
        elif self._mover.wants(tensor):
            moved = self._mover.move(tensor.detach(), layout)
            sharing.moved = weakref.ref(moved)
        if moved is None:
            sharing.keeping.append((weakref.ref(handle), layout))
            return
        handle.follow(moved, layout)
        for earlier, its_layout in sharing.keeping:
            if (keeper := earlier()) is not None:
                keeper.follow(moved, its_layout)
                moved.saved_again()
        sharing.keeping.clear()

    def _unpack(self, handle: _Handle) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise ConfigError(
                f"memory={self._name} cannot differentiate twice what it moves: backward "
                "ran with create_graph=True; use memory=vanilla or memory=checkpoint for that"
            )
        self._tracker.backward_reads(handle.group)
        return handle.load()

    def _is_movable(self, tensor: torch.Tensor) -> bool:
        return (
            is_plain(tensor)
            and tensor.numel() * tensor.element_size() >= self._smallest_bytes
            and tensor.untyped_storage().data_ptr() not in self._resting
        )


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether bytes and strides are all there is to a tensor."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
