"""The device budget, enforced from outside our code: by the kernel, or by the CUDA allocator."""

import resource
from abc import ABC, abstractmethod

import torch
from torch import nn

from umtrain.memory.allocator import FreedBuffers, close_heap_holes, set_freed_buffers
from umtrain.memory.available import available_bytes
from umtrain.memory.linux import data_bytes, is_linux, require_linux
from umtrain.memory.tensors import model_bytes

_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same, on other systems
    "out of memory",  # CUDA, cuDNN
    "bad_alloc",  # C++ below torch
    "could not create a memory object",  # oneDNN
    "could not create a primitive",  # oneDNN, whose scratchpad is malloc'ed
    "Resource temporarily unavailable",  # the stack of a new thread
)

_IMPOSSIBLE_SHAPE = "could not create a primitive descriptor"  # oneDNN; memory has no part in it


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is how torch, or what is below it, says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).replace(_IMPOSSIBLE_SHAPE, "")
    return any(sign in text for sign in _OUT_OF_MEMORY_TEXTS)


class DeviceBudget(ABC):
    """A limit on device memory, model included, that holds until it is lifted."""

    @abstractmethod
    def left_bytes(self) -> int | None:
        """Return what the heap has left of it, 0 if nothing; None if there is no limit."""

    def holds(self, n_bytes: int) -> bool:
        """Return whether `n_bytes` more fit now."""
        left_bytes = self.left_bytes()
        return left_bytes is None or n_bytes <= left_bytes

    @abstractmethod
    def lift(self) -> None:
        """Restore the limit that there was before."""


class NoBudget(DeviceBudget):
    """All the memory there is."""

    def left_bytes(self) -> int | None:
        """See `DeviceBudget`."""
        return None

    def lift(self) -> None:
        """See `DeviceBudget`."""


class HeapLimit(DeviceBudget):
    """A limit on the heap of the whole process, kept by the kernel.

    # Note: [The heap's limit]
    # RLIMIT_DATA caps private writable memory (VmData) without root; malloc then fails and torch
    # raises. Shared file mappings are exempt: they are the host tier.
    """

    def __init__(self, limit_bytes: int) -> None:
        _start_thread_pools()
        self._limit_bytes = limit_bytes
        self._before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, self._before[1]))

    def left_bytes(self) -> int | None:
        """See `DeviceBudget`."""
        return max(0, self._limit_bytes - data_bytes())

    def lift(self) -> None:
        """See `DeviceBudget`."""
        resource.setrlimit(resource.RLIMIT_DATA, self._before)


class AllOfTheMachine(HeapLimit):
    """What the machine has left: running out is an error of this process, not its end by SIGKILL.

    Most steps fit in it; in a container with a tight limit a strategy has to economise as it does
    under a budget.
    """

    def __init__(self) -> None:
        super().__init__(data_bytes() + available_bytes())


class HeapBudget(HeapLimit):
    """A budget on the CPU. What the process held before is not its business; the model is.

    A fragmented heap would count as used, so freed buffers go back to the kernel meanwhile; what
    the heap had free before would not count at all, so it is out of use meanwhile.
    """

    def __init__(self, budget_bytes: int, model: nn.Module) -> None:
        require_linux("memory.device_budget on the CPU")
        self._buffers_before = set_freed_buffers(FreedBuffers.GIVE_BACK)
        self._reopen_heap_holes = close_heap_holes()
        super().__init__(data_bytes() - model_bytes(model) + budget_bytes)

    def lift(self) -> None:
        """See `DeviceBudget`."""
        super().lift()
        set_freed_buffers(self._buffers_before)  # first: what is freed is else given back
        self._reopen_heap_holes()


def _start_thread_pools() -> None:
    """Run a parallel op and a backward pass: their threads' stacks come before the limit."""
    torch.autograd.backward(torch.ones(1 << 20, requires_grad=True).sum())


class CudaBudget(DeviceBudget):
    """A budget on the GPU, enforced by torch's caching allocator.

    The allocator counts what idle pools hold, the managed one too; that is not this budget's.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        torch.cuda.empty_cache()
        idle_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        total_bytes = torch.cuda.mem_get_info()[1]
        share = (budget_bytes + idle_bytes) / total_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def left_bytes(self) -> int | None:
        """See `DeviceBudget`."""
        # What the allocator has cached but does not use, it hands out again or gives back.
        return max(0, self._budget_bytes - torch.cuda.memory_allocated())

    def lift(self) -> None:
        """See `DeviceBudget`."""
        torch.cuda.set_per_process_memory_fraction(1.0)


def enforce_budget(device: str, budget_bytes: int | None, model: nn.Module) -> DeviceBudget:
    """Limit device memory to `budget_bytes` from now on; None is all that the machine has."""
    if budget_bytes is None:
        return AllOfTheMachine() if device == "cpu" and is_linux() else NoBudget()
    return CudaBudget(budget_bytes) if device == "cuda" else HeapBudget(budget_bytes, model)
