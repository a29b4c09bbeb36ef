"""From a step's buffers to the peak of device memory, as the meters count it.

Without a GPU that is the resident set over what the process held before the model: the heap with
its holes where freed buffers are used again, what is alive where a budget has them given back.
On a GPU it is what torch's allocator has handed out.
"""

import statistics
from dataclasses import dataclass, replace
from itertools import chain

from umtrain.memory.allocator import FreedBuffers, allowed_hole_bytes
from umtrain.planning.heap import Event, Heap
from umtrain.planning.profile import Profile
from umtrain.planning.step import StepTrace
from umtrain.planning.usage import Usage, events, page_bytes, resident_bytes

# What a process holds besides buffers: without a GPU code, compiled kernels and threads' own heaps
# (ResNet-50 at 256 pixels); on one what cuDNN keeps (ResUNet35 on an H200), and cuBLAS's workspaces
# if anything calls it (ResNet-50 and -101 on an H100 and an H200, torch 2.11).
_PROCESS_BYTES = {"cpu": 70 * 2**20, "cuda": 8 * 10**6}
_CUBLAS_BYTES = 72 * 10**6
_MATRIX_PRODUCTS = {"addmm", "mm", "bmm", "baddbmm"}
# The same where freed buffers are used again: what is small lies in the heap's holes.
PROCESS_BESIDE_HEAP_BYTES = 36 * 2**20
# Smaller buffers live in the gaps between the others.
_LEAST_BYTES = 64 * 2**10
# The holes of one step are there in the next; after a few it has nearly all it needs.
_N_STEPS = 6
_SEEDS = (0, 1, 2)
# The share of all buffers of a step whose pages were given back before: page faults of checkpoint,
# vdnn and lms on ResUNet35 at 512 to 2048 and ResNet-50 at 512 pixels were 0.32 to 0.61 of them.
_SHARE_FAULTED = 0.5
_CUDA_GRANULE_BYTES = 512
_PAGE_BYTES = 4096


def process_bytes(trace: StepTrace, device_kind: str) -> int:
    """Return what a process holds besides buffers."""
    uses_cublas = any(operation.name in _MATRIX_PRODUCTS for operation in trace.operations)
    libraries_bytes = _CUBLAS_BYTES if device_kind == "cuda" and uses_cublas else 0
    return _PROCESS_BYTES[device_kind] + libraries_bytes


@dataclass(frozen=True)
class Residence:
    """What a record would show as memory_use.device_peak_bytes, and what a step touches anew."""

    peak_bytes: int
    fresh_bytes: int


def residence_of(usage: Usage, profile: Profile, *, is_budgeted: bool) -> Residence:
    """Return what is in device memory at most, and how much of it comes as fresh pages.

    Of managed memory, which a record counts wherever it is, only what is on the device: all of it
    where there is room.
    """
    pages = page_bytes(usage)
    live = live_bytes(usage, profile)
    if is_budgeted or profile.kind == "cuda":
        held_bytes = max((a + b for a, b in zip(live, pages, strict=True)), default=0)
        held_bytes += resident_bytes(usage.trace, profile.kind) + process_bytes(
            usage.trace, profile.kind
        )
        # With a budget freed buffers go back to the kernel: each is touched anew every time.
        is_fresh = profile.kind == "cpu"
        return Residence(held_bytes, sum(s.n_bytes for s in usage.stays) if is_fresh else 0)
    heap_bytes = int(statistics.mean(_recycled_bytes(usage, seed) for seed in _SEEDS))
    fresh_bytes = 0
    if usage.limited_holes_of is not None:
        alive_bytes = max(live, default=0)
        holes_bytes = allowed_hole_bytes(alive_bytes, usage.limited_holes_of)
        most_bytes = resident_bytes(usage.trace, profile.kind) + alive_bytes + holes_bytes
        fresh_bytes = _faulted_bytes(usage, holes_bytes)
        heap_bytes = min(heap_bytes, most_bytes)
    with_pages_bytes = heap_bytes + max(pages, default=0)
    resident = min(with_pages_bytes, max(heap_bytes, profile.device_bytes))
    return Residence(resident + PROCESS_BESIDE_HEAP_BYTES, fresh_bytes)


def _faulted_bytes(usage: Usage, holes_bytes: int) -> int:
    """Return what is touched anew where holes of more than `holes_bytes` are given back.

    See `umtrain.memory.allocator.HeapHoles`.
    """
    taken = chain.from_iterable(events(usage, "cpu", _LEAST_BYTES))
    taken_bytes = sum(event.n_bytes for event in taken)
    return int(_SHARE_FAULTED * max(0, taken_bytes - holes_bytes))


def least_bytes(usage: Usage, profile: Profile) -> int:
    """Return the least budget that the usage fits in: what is alive, and nothing more."""
    if usage.least_stays is not None:
        usage = replace(usage, stays=usage.least_stays)
    live = max(live_bytes(usage, profile), default=0)
    return (
        resident_bytes(usage.trace, profile.kind) + live + process_bytes(usage.trace, profile.kind)
    )


def live_bytes(usage: Usage, profile: Profile) -> list[int]:
    """Return the bytes of buffers during each operation, scratch memory included."""
    granule_bytes = _CUDA_GRANULE_BYTES if profile.kind == "cuda" else _PAGE_BYTES
    levels: list[int] = []
    sizes: dict[int, int] = {}
    total = 0
    for operation in events(usage, profile.kind):
        peak = total
        for event in operation:
            if event.n_bytes:
                sizes[event.buffer] = -(-event.n_bytes // granule_bytes) * granule_bytes
                total += sizes[event.buffer]
                peak = max(peak, total)
            else:
                total -= sizes.pop(event.buffer)
        levels.append(peak)
    return levels


def _recycled_bytes(usage: Usage, seed: int) -> int:
    """Return the heap's peak, model and optimizer's state in it."""
    trace = usage.trace
    heap = Heap(FreedBuffers.RECYCLE.value[0], seed=seed)
    resident = [a for a in trace.allocations if a.kind in ("parameter", "buffer")]
    states = [a for a in trace.allocations if a.kind == "state"]
    step = list(chain.from_iterable(events(usage, "cpu", _LEAST_BYTES)))
    for number in range(_N_STEPS):
        for event in step:
            heap.apply(event)
        if number == 0:
            # The optimizer makes its state at the end of the first step.
            for index, state in enumerate(states):
                heap.apply(Event(len(usage.stays) + index, state.n_bytes))
    return heap.peak_bytes + sum(a.n_bytes for a in resident)
