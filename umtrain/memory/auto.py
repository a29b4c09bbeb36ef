"""Choose the memory strategy: ordinary training where it fits, streaming where it does not."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from umtrain.memory.available import available_bytes
from umtrain.memory.base import Strategy
from umtrain.memory.options import Options
from umtrain.memory.stats import MemoryStats
from umtrain.memory.stream import Stream
from umtrain.memory.vanilla import Vanilla
from umtrain.memory.working_set import WorkingSets, measure_working_sets
from umtrain.units import format_bytes

_log = logging.getLogger(__name__)

_ADAM_STATES = 2
_MARGIN = 0.85


class Auto(Strategy):
    """Becomes `vanilla` or `stream` when it first sees the model and a batch; says which and why.

    `chosen` is the strategy that runs.
    """

    name: ClassVar[str] = "auto"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.chosen: Strategy = Vanilla(options)

    @property
    def running_name(self) -> str:
        """See `Strategy`."""
        return self.chosen.name

    def prepare(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """See `Strategy`."""
        measured = measure_working_sets(model, sample_batch)
        self._choose(training_bytes(measured), "training")
        return self.chosen.prepare(model, sample_batch)

    def prepare_inference(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """See `Strategy`."""
        measured = measure_working_sets(model, sample_batch)
        self._choose(inference_bytes(measured), "evaluation")
        return self.chosen.prepare_inference(model, sample_batch)

    def _choose(self, needed_bytes: int, what: str) -> None:
        budget_bytes, whose = self._budget_bytes()
        fits = self.links.agree(needed_bytes <= _MARGIN * budget_bytes)
        if not fits:
            self.chosen.close()
            self.chosen = Stream(self.options)
            self.chosen.on_progress = lambda share: self.on_progress(share)
        self.chosen.links = self.links
        self.trace = self.chosen.trace
        _log.info(
            "memory=auto: %s, as ordinary %s needs about %s of %s %s",
            self.chosen.name,
            what,
            format_bytes(needed_bytes),
            format_bytes(budget_bytes),
            whose,
        )

    def _budget_bytes(self) -> tuple[int, str]:
        if self.options.device_budget_bytes is not None:
            return self.options.device_budget_bytes, "(memory.device_budget)"
        if self.options.device == "cuda":
            return int(torch.cuda.mem_get_info()[0]), "free on the GPU"
        return available_bytes(), "free"

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        raise AssertionError("the chosen strategy attaches itself")

    @contextmanager
    def step(self) -> Generator[None]:
        """See `Strategy`."""
        with self.chosen.step():
            yield

    @contextmanager
    def guard(self) -> Generator[None]:
        """See `Strategy`."""
        with self.chosen.guard():
            yield

    def stats(self) -> MemoryStats:
        """See `Strategy`."""
        return self.chosen.stats()

    def close(self) -> None:
        """See `Strategy`."""
        self.chosen.close()


def training_bytes(measured: WorkingSets) -> int:
    """Return about what ordinary training of a step holds at its peak, model included.

    What autograd saves, the largest layer's working set on top of it, and parameters with
    gradients and the two states of Adam.
    """
    largest = max((layer.working_set_bytes for layer in measured.layers), default=0)
    return measured.saved_bytes + largest + (2 + _ADAM_STATES) * measured.parameter_bytes


def inference_bytes(measured: WorkingSets) -> int:
    """Return about what evaluation holds at its peak: the largest layer, a shortcut beside it."""
    largest = max((layer.working_set_bytes for layer in measured.layers), default=0)
    return 2 * largest + measured.parameter_bytes
