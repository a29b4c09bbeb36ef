"""Ordinary training: everything stays in device memory. The reference of all others."""

from typing import Any, ClassVar

from torch import nn

from umtrain.memory.base import Strategy


class Vanilla(Strategy):
    """Torch as it is, under the device budget: out of memory is real."""

    name: ClassVar[str] = "vanilla"

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        return model
