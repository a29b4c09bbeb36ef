"""Unified memory: saved tensors on pages that migrate on demand; the system does the paging."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from umtrain.errors import DeviceError
from umtrain.memory.budget import DeviceBudget, NoBudget
from umtrain.memory.hooked import HookedStrategy
from umtrain.memory.meters import Meter
from umtrain.memory.options import Options
from umtrain.memory.paging import Pager
from umtrain.memory.paging_managed import MANAGED_BLOCK_BYTES, ManagedPager
from umtrain.memory.paging_mapped import MappedPager
from umtrain.memory.saved import Mover
from umtrain.memory.trace import Trace
from umtrain.memory.working_set import WorkingSets


class UnifiedMemory(HookedStrategy):
    """Pages come in when they are touched and go out when there is no room, least recent first.

    On CUDA the driver does both, under a managed pool; without a GPU the OS does, under a mapped
    file (Chien et al., "Performance evaluation of advanced features in CUDA unified memory").
    """

    name: ClassVar[str] = "um"

    @property
    def smallest_bytes(self) -> int:
        """Return from what size on tensors migrate: on CUDA, what the driver moves at once."""
        return MANAGED_BLOCK_BYTES if self.options.device == "cuda" else super().smallest_bytes

    def prepare(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        """See `Strategy`."""
        prepared = super().prepare(model, sample_batch)
        self._pager.begin(self._budget)
        return prepared

    def _create_mover(self, model: nn.Module, measured: WorkingSets) -> Mover:
        self._pager = self._create_pager(measured)
        self._cleanup.callback(self._pager.close)
        return self._pager

    def _create_pager(self, measured: WorkingSets) -> Pager:
        if self.options.device == "cuda":
            return create_managed_pager(self.options, measured, self._meter, self.trace)
        return MappedPager(
            directory=self.options.spill_dir,
            measured=measured,
            host_budget_bytes=self.options.host_budget_bytes,
            room_bytes=lambda: self._budget.left_bytes(),
            meter=self._meter,
            trace=self.trace,
        )

    def _enforce_budget(self, model: nn.Module) -> DeviceBudget:
        if self.options.device == "cuda":
            return NoBudget()  # a managed pool counts wherever its pages are; it has its own limit
        return super()._enforce_budget(model)

    @contextmanager
    def _around_step(self) -> Generator[None]:
        with self._pager.around_step(), super()._around_step():
            yield


def create_managed_pager(
    options: Options, measured: WorkingSets, meter: Meter, trace: Trace
) -> Pager:
    """Return a pager over CUDA managed memory; raises DeviceError where the GPU has none."""
    try:
        from umtrain.memory.pool_cuda import TorchCudaDriver, managed_pool
    except ImportError as error:
        raise DeviceError(
            f"memory=um* on a GPU needs CuPy and the CUDA bindings ({error}); "
            "install them with: pip install 'umtrain[cuda]'"
        ) from error
    pool = managed_pool(options.host_budget_bytes, options.oversubscribe)
    budget_bytes = options.device_budget_bytes
    room_bytes = None
    if budget_bytes is not None:
        # Parameters, their gradients and the largest group's working set stay on the device.
        room_bytes = max(0, budget_bytes - 2 * measured.parameter_bytes)
    meter.count_managed_memory()
    meter.notes["device_peak_bytes"] = "managed memory counts wherever its pages are"
    return ManagedPager(TorchCudaDriver(), "cuda", room_bytes, meter, trace, pool.serving)
