"""vDNN: the inputs of layers are offloaded layer by layer, each layer waiting for its own.

Rhu et al., "vDNN: virtualized deep neural networks for scalable, memory-efficient neural network
design" (2016). `policy=all` offloads the inputs of all layers, `policy=conv` those of
convolutions; what else autograd saves stays in device memory.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from umtrain.memory.channels import create_channel
from umtrain.memory.hooked import HookedStrategy
from umtrain.memory.saved import Mover
from umtrain.memory.swap import Channel, Swapper
from umtrain.memory.working_set import WorkingSets, leaf_modules


class LayerInputSwapper(Swapper):
    """Swaps the inputs of the layers it is attached to; a layer ends when its input is out."""

    _input_shapes: frozenset[torch.Size] = frozenset()

    def wants(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is the running layer's input, autocast's copy of it included."""
        return tensor.shape in self._input_shapes and super().wants(tensor)

    def enter_layer(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Note what the layer's input looks like (a forward pre-hook)."""
        tensors = (argument for argument in arguments if isinstance(argument, torch.Tensor))
        self._input_shapes = frozenset(tensor.shape for tensor in tensors)

    def leave_layer(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Wait for the layer's input to be out (a forward hook)."""
        self._input_shapes = frozenset()
        self.finish_out()


class Vdnn(HookedStrategy):
    """Offloads layer by layer, with one layer swapped in ahead in backward."""

    name: ClassVar[str] = "vdnn"

    def _create_mover(self, model: nn.Module, measured: WorkingSets) -> Mover:
        channel: Channel = create_channel(self.options, measured, self.trace)
        self._cleanup.callback(channel.close)
        self._swapper = LayerInputSwapper(
            channel, measured.largest_saved_bytes, self._meter, self.trace
        )
        self._cleanup.callback(self._follow_layers(model))
        return self._swapper

    def _follow_layers(self, model: nn.Module) -> Any:
        kinds = _ConvNd if self.options.policy == "conv" else nn.Module
        stack = ExitStack()
        for _, layer in leaf_modules(model):
            if isinstance(layer, kinds):
                stack.callback(layer.register_forward_pre_hook(self._swapper.enter_layer).remove)
                stack.callback(layer.register_forward_hook(self._swapper.leave_layer).remove)
        return stack.close

    @contextmanager
    def _around_step(self) -> Generator[None]:
        self._swapper.start_step()
        with super()._around_step():
            yield
