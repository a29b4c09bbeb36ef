"""memory=auto: the fastest strategy, by prediction, that surely fits; says which and why."""

import dataclasses
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from umtrain import memory
from umtrain.errors import ConfigError
from umtrain.memory.base import Strategy
from umtrain.memory.options import Options
from umtrain.memory.stats import MemoryStats
from umtrain.memory.tensors import batch_arguments, planned_device
from umtrain.memory.vanilla import Vanilla
from umtrain.memory.working_set import WorkingSets, measure_working_sets
from umtrain.planning.choice import MARGIN, choose
from umtrain.planning.machine import free_profile
from umtrain.planning.profile import Profile
from umtrain.planning.subject import Subject
from umtrain.units import format_bytes

_log = logging.getLogger(__name__)


class Auto(Strategy):
    """Becomes another strategy when it first sees the model and a batch.

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
        """See `Strategy`; raises OutOfMemoryError, naming the least budget, if nothing fits."""
        subject = Subject(model, sample_batch, _precision(model))
        try:
            choice = choose(subject, self._profile(model, sample_batch), self.options)
        except ConfigError as error:
            _log.warning("memory=auto: vanilla, as nothing can be predicted: %s", error)
            self._become("vanilla")
        else:
            self._become(choice.prediction.strategy)
            _log.info("memory=auto: %s", choice.sentence)
        return self.chosen.prepare(model, sample_batch)

    def prepare_inference(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """See `Strategy`: forward as usual where it fits, else in strips."""
        needed_bytes = inference_bytes(measure_working_sets(model, sample_batch))
        free_bytes = free_profile(self.options, model).device_bytes
        limit_bytes = self.options.device_budget_bytes or free_bytes
        self._become("vanilla" if needed_bytes <= MARGIN * limit_bytes else "stream")
        _log.info(
            "memory=auto: %s, as ordinary evaluation needs about %s of %s",
            self.chosen.name,
            format_bytes(needed_bytes),
            format_bytes(limit_bytes),
        )
        return self.chosen.prepare_inference(model, sample_batch)

    def _profile(self, model: nn.Module, sample_batch: Any) -> Profile:
        """Return this machine with what is free; a batch that is there already counts as free."""
        profile = free_profile(self.options, model)
        batch_bytes = sum(t.nbytes for t in batch_arguments(sample_batch) if not t.is_meta)
        return dataclasses.replace(profile, device_bytes=profile.device_bytes + batch_bytes)

    def _become(self, name: str) -> None:
        name = self.links.agree(name)
        if name != self.chosen.name:
            self.chosen.close()
            self.chosen = memory.create_from(name, self.options)
        self.chosen.on_progress = lambda share: self.on_progress(share)
        self.chosen.links = self.links
        self.trace = self.chosen.trace

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


def _precision(model: nn.Module) -> str:
    """Return the precision of the autocast that `prepare` was called under."""
    kind = planned_device(model).type
    is_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
    return "bf16" if is_bf16 else "fp32"


def inference_bytes(measured: WorkingSets) -> int:
    """Return about what evaluation holds at its peak: the largest layer, a shortcut beside it."""
    return 2 * measured.largest_working_set_bytes + measured.parameter_bytes
