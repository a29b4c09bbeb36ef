"""Exact streaming: forward and backward strip by strip, so that feature maps need never all exist.

The engine and its derivation are in umtrain/streaming. Gradients equal those of vanilla up to the
order of summation; in float64 that is 1e-11, relative.
"""

import logging
from typing import Any, ClassVar

import torch
from torch import nn

from umtrain.errors import OutOfMemoryError
from umtrain.memory import linux
from umtrain.memory.allocator import FreedBuffers, set_freed_buffers
from umtrain.memory.available import available_bytes
from umtrain.memory.base import Strategy
from umtrain.memory.budget import DeviceBudget
from umtrain.memory.options import Options
from umtrain.memory.stream_host import FileHost, PinnedHost
from umtrain.memory.tensors import batch_arguments, model_bytes
from umtrain.streaming.module import STRIP_BYTES, Streamer
from umtrain.streaming.running import Settings
from umtrain.units import format_bytes

_log = logging.getLogger(__name__)

_ADAM_STATES = 2
# Rooms, sources and gradients of a segment, and what oneDNN and cuDNN lay out anew.
_STRIPS_ALIVE = {"cpu": 24, "cuda": 18}
_STRIPS_IN_BUDGET = 256
# oneDNN compiles a kernel for each operation and height of strips, and keeps them.
_COMPILED_BYTES = {"cpu": 96 * 2**20, "cuda": 0}
_LEAST_STRIP_BYTES = {"cpu": 2**20, "cuda": 2**24}
_SHARE_OF_FREE = 0.85
_SHARE_OF_FRAGMENTS = 1 / 32  # of a budget: what an allocator holds between what it handed out


def allocate(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Return fresh memory, uint8 (n_bytes,): aligned, and where it is the heap, in huge pages.

    The first touch of a page costs more than filling it: 6 times less in pages of 2 MiB.
    """
    if device.type != "cpu":
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    unit = linux.HUGE_PAGE_BYTES
    room = torch.empty(n_bytes + unit, dtype=torch.uint8)
    lead = -room.data_ptr() % unit
    if linux.is_linux() and n_bytes >= unit:
        linux.use_huge_pages(room.data_ptr() + lead, n_bytes // unit * unit)
    return room[lead : lead + n_bytes]


def choose_strip_bytes(device: str, budget_bytes: int | None) -> int:
    """Return the usual size of strips, or less where that would take much of the budget."""
    if budget_bytes is None:
        return STRIP_BYTES[device]
    share = budget_bytes // _STRIPS_IN_BUDGET
    return min(STRIP_BYTES[device], max(_LEAST_STRIP_BYTES[device], share))


def maps_bytes(left_bytes: int, budget_bytes: int | None) -> int:
    """Return what of the memory that is left is for maps, before all else that a step needs."""
    if budget_bytes is None:
        return int(_SHARE_OF_FREE * left_bytes)
    return left_bytes - int(_SHARE_OF_FRAGMENTS * budget_bytes)


def strips_bytes(device: str, strip_bytes: int) -> int:
    """Return what strips take, and the kernels that are compiled for them."""
    return _STRIPS_ALIVE[device] * strip_bytes + _COMPILED_BYTES[device]


def other_bytes(held_bytes: int, gradient_bytes: int) -> int:
    """Return the bytes of gradients and optimizer state to come, and of weights in bf16."""
    states = (1 + _ADAM_STATES) * held_bytes - min(held_bytes, gradient_bytes)
    return states + held_bytes // 2


class Stream(Strategy):
    """Runs what it can of a network in strips of rows, and the rest whole."""

    name: ClassVar[str] = "stream"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._host = self._create_host()
        self._cleanup.callback(self._host.close)

    def _create_host(self) -> FileHost | PinnedHost:
        options = self.options
        if options.device == "cuda":
            from umtrain.memory.pool_cuda import TorchCudaDriver

            return PinnedHost(TorchCudaDriver(), options.host_budget_bytes, self._meter)
        return FileHost(options.spill_dir, options.host_budget_bytes, self._meter, self.trace)

    def prepare(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """See `Strategy`; says how the step will be done."""
        prepared = super().prepare(model, sample_batch)
        try:
            plans = self._streamer.plan(*batch_arguments(sample_batch))
        except OutOfMemoryError as error:
            raise OutOfMemoryError(self._least_text(error)) from error
        self._host.reserve(sum(plan.host_bytes for plan in plans))
        for plan in plans:
            _log.info("memory=stream: %s", plan.summary())
        return prepared

    def prepare_inference(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """See `Strategy`: forward in strips as well."""
        return self._attach(model, sample_batch)

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        self._model = model
        self._strip_bytes = choose_strip_bytes(
            self.options.device, self.options.device_budget_bytes
        )
        settings = Settings(
            self._arena_bytes, self._host, self._strip_bytes, self._report, allocate, self.links
        )
        self._granted_bytes: int | None = None
        self._streamer = Streamer(model, settings)
        model.forward = self._streamer
        self._cleanup.callback(self._streamer.close)
        self._cleanup.callback(delattr, model, "forward")
        return model

    def _report(self, share: float) -> None:
        self.on_progress(share)

    def _enforce_budget(self, model: nn.Module) -> DeviceBudget:
        budget = super()._enforce_budget(model)
        before = set_freed_buffers(FreedBuffers.RECYCLE_STRIPS)
        self._cleanup.callback(set_freed_buffers, before)
        return budget

    def _arena_bytes(self) -> int:
        """Return what feature maps may take beside an arena that is idle.

        A budget is divided once, before the first step: later, what steps need is there already.
        """
        if self.options.device_budget_bytes is None:
            return self._free_bytes()
        if self._granted_bytes is None:
            self._granted_bytes = self._free_bytes()
        return self._granted_bytes - self._streamer.idle_bytes

    def _free_bytes(self) -> int:
        """Return what is free, less all else that a step needs."""
        left_bytes = self._budget.left_bytes()
        if left_bytes is None:
            is_cuda = self.options.device == "cuda"
            ram_bytes = available_bytes() - self.options.readers_bytes
            left_bytes = int(torch.cuda.mem_get_info()[0]) if is_cuda else ram_bytes
        return maps_bytes(left_bytes, self.options.device_budget_bytes) - self._other_bytes()

    def _other_bytes(self) -> int:
        """Return the bytes of gradients, optimizer state, weights in bf16 and strips."""
        gradients = sum(p.grad.nbytes for p in self._model.parameters() if p.grad is not None)
        others = other_bytes(model_bytes(self._model), gradients)
        return others + strips_bytes(self.options.device, self._strip_bytes)

    def _least_text(self, error: OutOfMemoryError) -> str:
        budget = self.options.device_budget_bytes or 0
        missing = getattr(error, "missing_bytes", None)
        if missing is None:
            return str(error)
        return (
            f"memory=stream: memory.device_budget={format_bytes(budget)} is too small; "
            f"the least that works here is {format_bytes(budget + missing)} ({error})"
        )
