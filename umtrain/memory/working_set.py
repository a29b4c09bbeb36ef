"""The working set of every layer, found by running the model on fake tensors.

Fake tensors (`FakeTensorMode`) have shapes, strides and storages but no memory, so a forward pass
over them costs neither memory nor compute, at any resolution.
"""

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from umtrain.errors import ConfigError
from umtrain.memory.tensors import (
    batch_arguments,
    fake_like,
    fake_state,
    model_bytes,
    planned_device,
)


@dataclass
class LayerUse:
    """What one call of a layer (a leaf module) touches; storages are bytes by identity.

    Functional operations (an addition, a concatenation) belong to the layer called before them.
    """

    name: str
    kind: str
    storages: dict[int, int] = field(default_factory=dict)
    saved: dict[int, int] = field(default_factory=dict)
    workspace_bytes: int = 0

    @property
    def working_set_bytes(self) -> int:
        """Return the bytes that its backward pass touches."""
        return working_set_bytes([self])


def working_set_bytes(layers: Iterable[LayerUse]) -> int:
    """Return the working set of layers executed together: shared storages count once."""
    together: dict[int, int] = {}
    workspace_bytes = 0
    for layer in layers:
        together |= layer.storages
        workspace_bytes = max(workspace_bytes, layer.workspace_bytes)
    return sum(together.values()) + workspace_bytes


@dataclass(frozen=True)
class WorkingSets:
    """Every call of a layer in one forward pass, in order."""

    layers: list[LayerUse]
    parameter_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Return the bytes that autograd saves in one step, parameters left out."""
        together: dict[int, int] = {}
        for layer in self.layers:
            together |= layer.saved
        return sum(together.values())

    @property
    def largest_saved_bytes(self) -> int:
        """Return the bytes of the largest saved tensor."""
        return max((size for layer in self.layers for size in layer.saved.values()), default=0)

    @property
    def largest_working_set_bytes(self) -> int:
        """Return the working set of the layer that has the largest."""
        return max((layer.working_set_bytes for layer in self.layers), default=0)

    @property
    def step_bytes(self) -> int:
        """Return what one step holds at its peak if nothing leaves, the model left out."""
        return self.saved_bytes + self.parameter_bytes + self.largest_working_set_bytes


def measure_working_sets(model: nn.Module, sample_batch: Any) -> WorkingSets:
    """Return the working sets of `model`'s layers on a batch like `sample_batch`.

    Run it under the autocast that training runs in. Raises ConfigError if the model cannot be
    run without data (its control flow depends on values).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = planned_device(model)
    state = fake_state(model, mode, device)
    arguments = tree_map_only(
        torch.Tensor, lambda x: fake_like(x, mode, device), batch_arguments(sample_batch)
    )
    recorder = _Recorder(state.values())
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda saved: saved)
    try:
        with mode, hooks, recorder.listening_to(model), torch.enable_grad():
            output = functional_call(model, state, arguments)
    except Exception as error:
        raise ConfigError(
            f"the layers of {type(model).__name__} cannot be measured without data: {error}; "
            "use memory=um or memory=lms, which need no groups"
        ) from error
    del output
    return WorkingSets(recorder.layers, model_bytes(model))


class _Recorder:
    """Notes what each layer call touches."""

    def __init__(self, state: Iterable[torch.Tensor]) -> None:
        self.layers: list[LayerUse] = [LayerUse(name="(input)", kind="")]
        self._alive: list[torch.UntypedStorage] = []  # identities must not be used again
        self._state = {_identity(tensor) for tensor in state}

    @contextmanager
    def listening_to(self, model: nn.Module) -> Generator[None]:
        with ExitStack() as stack:
            for name, module in leaf_modules(model):
                enter = self._make_enter(name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                leave = module.register_forward_hook(self._leave)
                stack.callback(leave.remove)
            yield
            if not self.layers[0].storages:
                del self.layers[0]

    def _make_enter(self, name: str) -> Any:
        def enter(module: nn.Module, arguments: Any, keywords: Any) -> None:
            self.layers.append(LayerUse(name, type(module).__name__))
            for tensor in _tensors((arguments, keywords)):
                self._touch(tensor)
            for parameter in module.parameters(recurse=False):
                self._touch(parameter)

        return enter

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in _tensors(output):
            self._touch(tensor)
        if isinstance(module, nn.modules.conv._ConvNd):
            # oneDNN and cuDNN may reorder the larger operand into a layout of their own.
            operands = [*_tensors(arguments), *_tensors(output)]
            largest = max(t.numel() * t.element_size() for t in operands)
            self.layers[-1].workspace_bytes = largest

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        self._touch(tensor)
        identity = _identity(tensor)
        if identity not in self._state:
            self.layers[-1].saved[identity] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    def _touch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        self.layers[-1].storages[storage._cdata] = storage.nbytes()


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def leaf_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers of a model by name: the modules without children."""
    return [(name, m) for name, m in model.named_modules() if not any(m.children())]
