"""Explicit device placement: the named layers compute on the CPU, the rest on the GPU."""

from collections.abc import Callable
from functools import partial
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
        self._cleanup.callback(module.to, self.options.device)
        module.forward = partial(_run_on_cpu, module.forward)
        self._cleanup.callback(delattr, module, "forward")


def _run_on_cpu(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Run `forward` on the CPU, under the autocast that the GPU is under."""
    is_mixed, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    arguments, keywords = _all_to("cpu", (arguments, keywords))
    with torch.autocast("cpu", dtype, enabled=is_mixed):
        output = forward(*arguments, **keywords)
    return _all_to("cuda", output)


def _all_to(device: str, tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)
