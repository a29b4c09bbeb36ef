"""Count what a step does to memory, from the kernel's and the allocator's own counters."""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import nn

from umtrain.memory.allocator import give_back_free_memory
from umtrain.memory.linux import major_faults, process_status, reset_peak_rss
from umtrain.memory.stats import MemoryStats
from umtrain.memory.tensors import model_bytes


@dataclass
class Counters:
    """What strategies count themselves during one step; I/O threads count too."""

    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    host_bytes: int = 0
    stall_s: float = 0.0
    prefetch_hits: int = 0
    prefetch_late: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: float) -> None:
        """Add to the counters named."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def raise_to(self, **levels: int) -> None:
        """Raise the peaks named to at least these levels."""
        with self._lock:
            for name, level in levels.items():
                setattr(self, name, max(getattr(self, name), level))


class Meter(ABC):
    """Reads the counters around each step."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.notes: dict[str, str] = {}
        self._is_managed = False
        self._steps = 0
        self._stats = MemoryStats.before_any_step()

    @abstractmethod
    def mark_base(self, model: nn.Module) -> None:
        """Take what is in use now, less the model, as the zero of device memory."""

    @abstractmethod
    def _start(self) -> None: ...

    def count_managed_memory(self) -> None:
        """Count, from now on, what tensors asked for, not the segments that they are given.

        In a managed pool those are of 2 or 20 MiB, and pages that no one touches are nowhere.
        """
        self._is_managed = True

    @abstractmethod
    def _device_peak_bytes(self) -> int | None: ...

    @abstractmethod
    def _major_faults(self) -> int | None: ...

    @abstractmethod
    def _reasons(self) -> dict[str, str]: ...

    def start_step(self) -> None:
        """Begin a step's counts."""
        self.counters = Counters()
        self._start()

    def end_step(self) -> None:
        """Close the step's counts and make them the figures of `stats`."""
        before, now = self._stats, self.counters
        self._steps += 1
        self._stats = MemoryStats(
            steps=self._steps,
            device_peak_bytes=_larger(before.device_peak_bytes, self._device_peak_bytes()),
            host_peak_bytes=_larger(before.host_peak_bytes, now.host_bytes),
            rss_peak_bytes=_larger(before.rss_peak_bytes, process_status().get("VmHWM")),
            swapped_out_bytes=now.swapped_out_bytes,
            swapped_in_bytes=now.swapped_in_bytes,
            major_faults=self._major_faults(),
            stall_s=now.stall_s,
            prefetch_hits=now.prefetch_hits,
            prefetch_late=now.prefetch_late,
            reasons=self._reasons() | self.notes,
        )

    def stats(self) -> MemoryStats:
        """Return the figures of the last whole step."""
        return self._stats


def _larger(before: int | None, now: int | None) -> int | None:
    known = [value for value in (before, now) if value is not None]
    return max(known, default=None)


class CpuMeter(Meter):
    """Device memory is RAM: peak resident set over the base, as the kernel counts it."""

    def __init__(self) -> None:
        super().__init__()
        self._base_rss_bytes = 0
        self._faults_before = 0
        self._peak_is_of_step = False

    def mark_base(self, model: nn.Module) -> None:
        """See `Meter`."""
        give_back_free_memory()  # what the heap has free would count as in use
        self._base_rss_bytes = process_status().get("VmRSS", 0) - model_bytes(model)

    def _start(self) -> None:
        self._peak_is_of_step = reset_peak_rss()
        self._faults_before = major_faults()

    def _device_peak_bytes(self) -> int | None:
        peak_bytes = process_status().get("VmHWM")
        return None if peak_bytes is None else max(0, peak_bytes - self._base_rss_bytes)

    def _major_faults(self) -> int | None:
        return major_faults() - self._faults_before

    def _reasons(self) -> dict[str, str]:
        if not process_status():
            why = "this system has no /proc/self/status"
            return {"device_peak_bytes": why, "rss_peak_bytes": why}
        if not self._peak_is_of_step:
            why = "the kernel does not let VmHWM be reset: peak of the whole process"
            return {"device_peak_bytes": why, "rss_peak_bytes": why}
        return {}


class CudaMeter(Meter):
    """Device memory is what torch's allocator has handed out on the GPU, rounded up as it does."""

    def mark_base(self, model: nn.Module) -> None:
        """See `Meter`; torch's allocator starts from zero, so there is nothing to subtract."""

    def _start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def _device_peak_bytes(self) -> int | None:
        counted = "requested_bytes" if self._is_managed else "allocated_bytes"
        return int(torch.cuda.memory_stats()[f"{counted}.all.peak"])

    def _major_faults(self) -> int | None:
        return None

    def _reasons(self) -> dict[str, str]:
        return {"major_faults": "page faults of the GPU are counted by profilers only"}


def create_meter(device: str) -> Meter:
    """Return the meter of `device`."""
    return CudaMeter() if device == "cuda" else CpuMeter()
