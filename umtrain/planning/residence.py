"""From a step's buffers to the peak of device memory, as the meters count it.

Without a GPU that is the resident set over what the process held before the model: what is alive,
whether its pages come from the pool of freed ones (`umtrain.memory.page_pool`) or, with a budget,
from the kernel; and holes where there is neither. On a GPU it is what torch's allocator has handed
out.
"""

from dataclasses import dataclass, replace

from umtrain.planning.profile import Profile
from umtrain.planning.step import StepTrace
from umtrain.planning.usage import Usage, events, page_bytes, resident_bytes

# What a process holds besides buffers: without a GPU code, threads' own heaps, and for each
# convolution what oneDNN compiled and laid out (peaks of ResUNet35, ResNet-50 and ResNet-101 here);
# on one what cuDNN keeps (ResUNet35 on an H200), and cuBLAS's workspaces if anything calls it
# (ResNet-50 and -101 on an H100 and an H200, torch 2.11).
_PROCESS_BYTES = {"cpu": 20 * 2**20, "cuda": 8 * 10**6}
_CONVOLUTION_BYTES = 550 * 2**10
_CUBLAS_BYTES = 72 * 10**6
_MATRIX_PRODUCTS = {"addmm", "mm", "bmm", "baddbmm"}
_CUDA_GRANULE_BYTES = 512
# Without a GPU pages, and the units of the pool of pages for what it serves (page_pool.cpp).
_PAGE_BYTES, _UNIT_BYTES, _POOLED_FROM_BYTES = 4096, 512 * 2**10, 2**20


def process_bytes(trace: StepTrace, device_kind: str) -> int:
    """Return what a process holds besides buffers."""
    if device_kind == "cuda":
        uses_cublas = any(operation.name in _MATRIX_PRODUCTS for operation in trace.operations)
        return _PROCESS_BYTES["cuda"] + (_CUBLAS_BYTES if uses_cublas else 0)
    convolutions = [o for o in trace.operations if o.convolution and o.phase == "forward"]
    return _PROCESS_BYTES["cpu"] + _CONVOLUTION_BYTES * len(convolutions)


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
    beside_bytes = resident_bytes(usage.trace, profile.kind)
    beside_bytes += process_bytes(usage.trace, profile.kind)
    beside_bytes += hole_bytes(usage, live)
    held_bytes = max((a + b for a, b in zip(live, pages, strict=True)), default=0) + beside_bytes
    if profile.kind == "cpu" and is_budgeted:
        # Freed buffers go back to the kernel: each is touched anew every time.
        return Residence(held_bytes, sum(stay.n_bytes for stay in usage.stays))
    if profile.kind == "cpu":
        in_buffers_bytes = max(live, default=0) + beside_bytes
        held_bytes = min(held_bytes, max(in_buffers_bytes, profile.device_bytes))
    return Residence(held_bytes, 0)


def hole_bytes(usage: Usage, live: list[int]) -> int:
    """Return what holes take beside buffers of which `live` bytes are alive."""
    return int(usage.hole_share * max(live, default=0))


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
    levels: list[int] = []
    sizes: dict[int, int] = {}
    total = 0
    for operation in events(usage, profile):
        peak = total
        for event in operation:
            if event.n_bytes:
                sizes[event.buffer] = _rounded(event.n_bytes, profile.kind)
                total += sizes[event.buffer]
                peak = max(peak, total)
            else:
                total -= sizes.pop(event.buffer)
        levels.append(peak)
    return levels


def _rounded(n_bytes: int, device_kind: str) -> int:
    """Return what a buffer takes."""
    if device_kind == "cuda":
        granule_bytes = _CUDA_GRANULE_BYTES
    else:
        granule_bytes = _UNIT_BYTES if n_bytes >= _POOLED_FROM_BYTES else _PAGE_BYTES
    return -(-n_bytes // granule_bytes) * granule_bytes
