"""What every memory strategy is: one lifecycle, with the budget and the figures around it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from umtrain.errors import DeviceError, OutOfMemoryError
from umtrain.exchange import NO_LINKS
from umtrain.memory.advice import strategies_needing_less
from umtrain.memory.allocator import give_back_free_memory
from umtrain.memory.budget import DeviceBudget, NoBudget, enforce_budget, is_out_of_memory
from umtrain.memory.meters import create_meter
from umtrain.memory.options import Options
from umtrain.memory.stats import MemoryStats
from umtrain.memory.trace import Trace
from umtrain.units import format_bytes


class Strategy(ABC):
    """One way to hold a training step in memory.

    `on_progress` is told the share of a step that is done, by strategies that know it. `links`,
    set before `prepare`, tie the strategy to other processes that train the same model.

    Lifecycle: `prepare` once, `step` around each forward and backward, `stats` at any time,
    `close` at the end. Losses, gradients and running statistics are those of ordinary training.
    """

    name: ClassVar[str]

    def __init__(self, options: Options) -> None:
        """Check that this machine can do it; raises DeviceError or ConfigError if not."""
        if options.device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("device=cuda: torch finds no GPU here; use device=cpu")
        self.options = options
        self._meter = create_meter(options.device)
        self.trace = Trace()
        self._budget: DeviceBudget = NoBudget()
        self._cleanup = ExitStack()
        self._trace_folder = options.trace
        self.on_progress: Callable[[float], None] = lambda share: None
        self.links = NO_LINKS

    def prepare(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """Attach to `model` and enforce the budget; returns the module to train with.

        `sample_batch` is the model's input, or the tuple of its inputs, as in training; only its
        shapes, dtypes and strides count. Call it under the autocast that training runs in.
        Raises DeviceError where the host tier has not the room.
        """
        prepared = self._attach(model, sample_batch)
        self._budget = self._enforce_budget(model)
        self._cleanup.callback(self._budget.lift)
        self._meter.mark_base(model)
        return prepared

    def prepare_inference(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """Return the module to evaluate with, without gradients, outside of steps.

        Ordinary forward passes, where the strategy has no better way.
        """
        return model

    @property
    def running_name(self) -> str:
        """Return the name of the strategy that runs, where this one chooses another."""
        return self.name

    @contextmanager
    def step(self) -> Generator[None]:
        """Run one forward and backward pass inside it.

        Raises OutOfMemoryError if device or host memory runs out; the model stays usable.
        """
        self._meter.start_step()
        self.trace.start_step()
        with self.guard(), self._around_step():
            yield
        self._meter.end_step()

    @contextmanager
    def guard(self) -> Generator[None]:
        """Turn running out of memory into OutOfMemoryError; for what is done outside a step too."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(self._out_of_memory_text()) from error
            raise

    def stats(self) -> MemoryStats:
        """Return the figures of the last whole step."""
        return self._meter.stats()

    def close(self) -> None:
        """Give back memory, threads and the enforced budget; the model is as it was before.

        Writes trace.json and timeline.png where a trace was asked for and a step was run.
        """
        self._cleanup.close()
        # What the heap keeps for the next step is nobody's now: what comes next asks what is free.
        give_back_free_memory()
        folder, self._trace_folder = self._trace_folder, None
        if folder is not None and self.trace.spans():
            from umtrain.memory.timeline import write_timeline

            write_timeline(self.trace, folder, f"memory={self.name}")

    def _enforce_budget(self, model: nn.Module) -> DeviceBudget:
        return enforce_budget(self.options.device, self.options.device_budget_bytes, model)

    @abstractmethod
    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """Set up what the steps need; what has to be undone goes on `self._cleanup`."""

    def _around_step(self) -> AbstractContextManager[None]:
        """Return what surrounds forward and backward."""
        return nullcontext()

    def _out_of_memory_text(self) -> str:
        budget_bytes = self.options.device_budget_bytes
        limit = "all there is" if budget_bytes is None else format_bytes(budget_bytes)
        others = strategies_needing_less(self.name)
        remedy = f"memory={'|'.join(others)} needs less of it; or " if others else ""
        return (
            f"device memory ran out under memory={self.name} "
            f"(memory.device_budget: {limit}); {remedy}lower res or batch_size"
        )
