"""CUDA managed memory: the pool torch allocates from, and migrations; the only CUDA bindings.

# Note: [Callbacks under the allocator's lock]
# torch calls our allocation functions while it holds its allocator's mutex, and they need the
# GIL. A second Python thread that holds the GIL and waits for the mutex would be a deadlock, so
# only one Python thread touches CUDA: backward runs in the thread that called it.
"""

import ctypes
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from mmap import MADV_DONTFORK, MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from typing import Any

import cupy
import torch
from cuda.bindings import driver, runtime

from umtrain.errors import DeviceError
from umtrain.memory.cuda_driver import CudaDriver, Event, Location, Stream
from umtrain.units import format_bytes

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


def require_concurrent_managed_access() -> None:
    """Raise DeviceError if this GPU cannot migrate managed pages on demand."""
    attribute = runtime.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
    (value,) = _check(runtime.cudaDeviceGetAttribute(attribute, torch.cuda.current_device()))
    if not value:
        raise DeviceError(
            f"{torch.cuda.get_device_name()} cannot page managed memory on demand here "
            "(cudaDevAttrConcurrentManagedAccess is 0, as on Windows, WSL2 and some virtual "
            "GPUs), which memory=um* needs; use memory=lms, vdnn or checkpoint"
        )


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a CUDA call returned beside its error code, which it does not raise."""
    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise RuntimeError(f"CUDA: {text.decode()}")
    return tuple(values)


class ManagedPool:
    """CuPy's managed pool with a hard limit, served to torch as a MemPool.

    One per process: torch may call the functions as long as it holds a segment.
    """

    def __init__(self) -> None:
        self._pool = cupy.cuda.MemoryPool(cupy.cuda.malloc_managed)
        self._chunks: dict[int, Any] = {}
        self._functions = _ALLOCATE(self._allocate), _FREE(self._free)
        addresses = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self._functions)
        allocator = torch._C._cuda_customAllocator(*addresses)
        # Where torch can, each tensor is a segment of its own: ranges then never share blocks.
        whole = {"no_split": True} if "no_split" in signature(torch.cuda.MemPool).parameters else {}
        self._mem_pool = torch.cuda.MemPool(allocator, **whole)
        # Never freed, not even as the interpreter ends: torch frees its segments through us.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def limit(self, n_bytes: int) -> None:
        """Never hold more than `n_bytes` of managed memory from now on."""
        self._pool.set_limit(size=n_bytes)

    @property
    def held_bytes(self) -> int:
        """Return the managed memory held from CUDA."""
        return int(self._pool.total_bytes())

    @contextmanager
    def serving(self) -> Generator[None]:
        """Let torch allocate from the pool inside it, in this thread."""
        with torch.cuda.use_mem_pool(self._mem_pool):
            yield

    def _allocate(self, n_bytes: int, device: int, stream: int | None) -> int | None:
        try:
            chunk = self._pool.malloc(n_bytes)
        except cupy.cuda.memory.OutOfMemoryError:
            return None  # torch then raises its own out-of-memory error
        self._chunks[chunk.ptr] = chunk
        return int(chunk.ptr)

    def _free(self, address: int, n_bytes: int, device: int, stream: int | None) -> None:
        del self._chunks[address]


_pool: ManagedPool | None = None


def managed_pool(limit_bytes: int | None, is_oversubscription_allowed: bool) -> ManagedPool:
    """Return the process's managed pool, limited to `limit_bytes` (None: half of what is free).

    Raises DeviceError if that is more than the GPU has free: oversubscription can stall the
    whole GPU, so it has to be asked for.
    """
    global _pool
    require_concurrent_managed_access()
    held_bytes = _pool.held_bytes if _pool is not None else 0
    free_bytes = torch.cuda.mem_get_info()[0] + held_bytes
    limit_bytes = free_bytes // 2 if limit_bytes is None else limit_bytes
    if limit_bytes >= free_bytes and not is_oversubscription_allowed:
        raise DeviceError(
            f"memory.host_budget={format_bytes(limit_bytes)} of managed memory is more than the "
            f"{format_bytes(free_bytes)} that the GPU has free; lower it, or set "
            "memory.oversubscribe=true if nobody else uses this GPU"
        )
    if _pool is None:
        _pool = ManagedPool()
    _pool.limit(limit_bytes)
    return _pool


def _by_allocation(address: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut a managed range where one allocation ends and its neighbour begins.

    CUDA calls a range across both an invalid argument, as adjacent as they may be.
    """
    end = address + n_bytes
    while address < end:
        error, base, size_bytes = driver.cuMemGetAddressRange(address)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA: {address:#x} is not in any allocation ({error.name})")
        stop = min(end, int(base) + int(size_bytes))
        yield address, stop - address
        address = stop


class _PinnedRange(mmap):
    """Page-locked memory of just the size that is asked for; a tensor on it keeps it alive.

    torch's own pinned allocator rounds sizes up to powers of two, and page-locks fresh pages one
    by one. Pages that all cores have touched first, as huge as the system has them, lock faster.
    """

    _address = 0
    _is_locked = False

    @classmethod
    def create(cls, n_bytes: int) -> "_PinnedRange":
        """Return a range of at least `n_bytes`.

        Raises MemoryError if the system has none, RuntimeError if CUDA refuses to lock it.
        """
        size_bytes = -(-max(1, n_bytes) // PAGESIZE) * PAGESIZE
        try:
            pages = cls(-1, size_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size_bytes} bytes to page-lock: {error.strerror}") from error
        pages.madvise(MADV_DONTFORK)  # a copy on write would part the page from what is locked
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(MADV_HUGEPAGE)
        content = torch.frombuffer(pages, dtype=torch.uint8)
        content.fill_(0)
        _check(runtime.cudaHostRegister(content.data_ptr(), content.nbytes, 0))
        pages._address = content.data_ptr()
        pages._is_locked = True
        return pages

    def __del__(self) -> None:
        if self._is_locked:
            runtime.cudaDeviceSynchronize()  # copies under way
            runtime.cudaHostUnregister(self._address)


class TorchCudaDriver(CudaDriver):
    """The real thing: torch's streams and events, CUDA's own prefetch.

    CuPy cannot prefetch to the host on CUDA 13, and acts on whole chunks; ranges are ours.
    """

    def __init__(self) -> None:
        new_stream: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
        self._out = new_stream()
        self._in = new_stream()

    def prefetch(self, address: int, n_bytes: int, location: Location, stream: Stream) -> None:
        """See `CudaDriver`."""
        target = runtime.cudaMemLocation()
        kinds = runtime.cudaMemLocationType
        if location == "host":
            target.type = kinds.cudaMemLocationTypeHost
        else:
            target.type = kinds.cudaMemLocationTypeDevice
            target.id = torch.cuda.current_device()
        queue = self._stream(stream).cuda_stream
        for start, part_bytes in _by_allocation(address, n_bytes):
            _check(runtime.cudaMemPrefetchAsync(start, part_bytes, target, 0, queue))

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """See `CudaDriver`."""
        with torch.cuda.stream(self._stream(stream)):
            target.copy_(source, non_blocking=True)

    def allocate_pinned(self, n_bytes: int) -> torch.Tensor:
        """See `CudaDriver`."""
        return torch.frombuffer(_PinnedRange.create(n_bytes), dtype=torch.uint8)[:n_bytes]

    def record(self, stream: Stream) -> Event:
        """See `CudaDriver`."""
        return self._stream(stream).record_event()

    def wait(self, stream: Stream, event: Event) -> None:
        """See `CudaDriver`."""
        assert isinstance(event, torch.cuda.Event)
        self._stream(stream).wait_event(event)

    def is_done(self, event: Event) -> bool:
        """See `CudaDriver`."""
        assert isinstance(event, torch.cuda.Event)
        query: Callable[[], bool] = event.query
        return query()

    def synchronize(self) -> None:
        """See `CudaDriver`."""
        torch.cuda.synchronize()

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        if stream == "compute":
            return torch.cuda.current_stream()
        return self._out if stream == "out" else self._in
