"""Explicit device placement: the named layers compute on the CPU, the rest on the GPU."""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from umtrain.errors import ConfigError, DeviceError
from umtrain.memory.base import Strategy
from umtrain.memory.options import Options


class Placement(Strategy):
    """Feature maps cross over where a layer's device differs from the one before it."""

    name: ClassVar[str] = "placement"

    def __init__(self, options: Options) -> None:
        """See `Strategy`; also refuses a machine that has no second device."""
        super().__init__(options)
        if options.device != "cuda":
            raise DeviceError(
                "memory=placement divides a model between a GPU and the CPU, and device="
                f"{options.device} has no GPU; use memory=um, lms or checkpoint"
            )
        if not options.cpu_layers:
            raise ConfigError(
                "memory=placement needs memory.cpu_layers, the names of the modules to compute "
                "on the CPU, for example memory.cpu_layers=[layer1]"
            )

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        modules = dict(model.named_modules())
        if unknown := [name for name in self.options.cpu_layers if name not in modules]:
            children = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(
                f"memory.cpu_layers names {', '.join(unknown)}, which the model has not; "
                f"its modules are {children} and those inside them"
            )
        for name in self.options.cpu_layers:
            self._place_on_cpu(modules[name])
        return model

    def _place_on_cpu(self, module: nn.Module) -> None:
        module.to("cpu")
        enter = module.register_forward_pre_hook(_arguments_to_cpu)
        leave = module.register_forward_hook(_output_to_gpu)
        self._cleanup.callback(module.to, self.options.device)
        self._cleanup.callback(leave.remove)
        self._cleanup.callback(enter.remove)


def _arguments_to_cpu(module: nn.Module, arguments: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), arguments)


def _output_to_gpu(module: nn.Module, arguments: Any, output: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda"), output)
