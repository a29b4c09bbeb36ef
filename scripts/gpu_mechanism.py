"""That the memory strategies do on a GPU what they say: where pages lie, and what overlaps.

One step of ResNet-50 each, after warm-up. `um_group_prefetch`: every saved tensor is managed
memory, ranges sent to the host say so before backward starts, and ranges asked for say so after
it. `lms`, `um_group_prefetch` and `stream`: copies and migrations are timed by CUDA events on
their own streams, kernels by the profiler; the overlap is the share of the kernels' time, in
forward for what goes out and in backward for what comes in, beside which something moved.

Prints one JSON document; with a path as argument, draws the timelines there.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import ClassVar

import torch
from cuda.bindings import runtime
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from umtrain import memory, models
from umtrain.memory import pool_cuda
from umtrain.memory.base import Strategy
from umtrain.memory.layout import Layout
from umtrain.memory.paging_managed import MANAGED_BLOCK_BYTES, ManagedBlock, ManagedPager
from umtrain.memory.timeline import draw_timelines
from umtrain.memory.trace import Lane, Span

RES = 1024
BATCH_SIZE = 5
HOST_LOCATION = -1  # cudaCpuDeviceId
MANAGED_LIMIT_BYTES = 8 * 2**30
# Less than the feature maps take; `lms` moves all of them whatever it is given.
ROOM_BYTES = {"lms": 4 * 2**30, "um_group_prefetch": 2 * 2**30, "stream": 2 * 2**30}
N_WARM_UP_STEPS = 3
BESIDE: dict[Lane, Lane] = {"swap-out": "forward", "swap-in": "backward"}


class Clock:
    """Timing events on one clock, read when all is done."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()
        self._spans: list[tuple[Lane, str, torch.cuda.Event, torch.cuda.Event, int]] = []

    @contextmanager
    def span(
        self, lane: Lane, name: str, stream: torch.cuda.Stream, n_bytes: int = 0
    ) -> Iterator[None]:
        edges = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        edges[0].record(stream)
        yield
        edges[1].record(stream)
        self._spans.append((lane, name, edges[0], edges[1], n_bytes))

    def seconds_to(self, event: torch.cuda.Event) -> float:
        return self._begin.elapsed_time(event) / 1e3

    def read(self) -> list[Span]:
        torch.cuda.synchronize()
        return [
            Span(0, lane, name, *map(self.seconds_to, edges), n_bytes)
            for lane, name, *edges, n_bytes in self._spans
        ]


class WatchedDriver(pool_cuda.TorchCudaDriver):
    """The real driver; takes note of what it was asked for and how long it took."""

    clock: Clock | None = None
    locations: ClassVar[dict[int, str]] = {}  # by block of 2 MiB
    addresses: ClassVar[list[int]] = []

    def prefetch(self, address: int, n_bytes: int, location: str, stream: str) -> None:
        for block in range(address, address + n_bytes, MANAGED_BLOCK_BYTES):
            WatchedDriver.locations[block] = location
        lane: Lane = "swap-out" if location == "host" else "swap-in"
        with self._timed(lane, stream, n_bytes):
            super().prefetch(address, n_bytes, location, stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        lane: Lane = "swap-out" if stream == "out" else "swap-in"
        with self._timed(lane, stream, source.nbytes):
            super().copy(target, source, stream)

    @contextmanager
    def _timed(self, lane: Lane, stream: str, n_bytes: int) -> Iterator[None]:
        if WatchedDriver.clock is None:
            yield
            return
        with WatchedDriver.clock.span(lane, stream, self._stream(stream), n_bytes):
            yield


def last_prefetch_locations() -> dict[str, int]:
    """Return how many blocks of 2 MiB say that they were last sent where they were asked to go."""
    attribute = runtime.cudaMemRangeAttribute.cudaMemRangeAttributeLastPrefetchLocation
    expected = {"host": HOST_LOCATION, "device": torch.cuda.current_device()}
    agreed = {"host": 0, "device": 0, "differ": 0}
    for address, asked in WatchedDriver.locations.items():
        error, found = runtime.cudaMemRangeGetAttribute(4, attribute, address, MANAGED_BLOCK_BYTES)
        if error == runtime.cudaError_t.cudaSuccess and found == expected[asked]:
            agreed[asked] += 1
        else:
            agreed["differ"] += 1
    return agreed


def count_managed(addresses: list[int]) -> dict[str, int]:
    managed = 0
    for address in addresses:
        _, attributes = runtime.cudaPointerGetAttributes(address)
        managed += attributes.type == runtime.cudaMemoryType.cudaMemoryTypeManaged
    return {"saved_tensors": len(addresses), "managed": managed}


def overlap(spans: list[Span], lane: Lane) -> dict[str, float]:
    """Return the time that a lane moves, and the share of the kernels' time beside it."""
    moving = merged([(s.start_s, s.end_s) for s in spans if s.lane == lane])
    busy = merged([(s.start_s, s.end_s) for s in spans if s.lane == BESIDE[lane]])
    busy_s = sum(stop - begin for begin, stop in busy)
    both_s = sum(
        max(0.0, min(end, stop) - max(start, begin))
        for start, end in moving
        for begin, stop in busy
    )
    return {
        "seconds": sum(end - start for start, end in moving),
        "share_of_kernels_beside": both_s / busy_s,
    }


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def kernels(events: list[object], half_s: float) -> list[Span]:
    """Return the kernels of a profile as spans, on the clock's time.

    The first is the marker that was launched as the clock began.
    """
    found = sorted(
        (e.time_range.start / 1e6, e.time_range.end / 1e6, e.name)
        for e in events
        if e.device_type == DeviceType.CUDA and not e.name.startswith(("Mem", "Activity"))
    )
    begin_s = found[0][0]
    return [
        Span(
            0,
            "forward" if start - begin_s < half_s else "backward",
            name,
            start - begin_s,
            end - begin_s,
            0,
        )
        for start, end, name in found[1:]
    ]


def watched_step(
    strategy: Strategy, model: nn.Module, batch: torch.Tensor, found: dict[str, object]
) -> list[Span]:
    """Run a step with everything timed; asks where pages lie between forward and backward."""
    is_managed = strategy.name.startswith("um")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        WatchedDriver.clock = clock = Clock()
        torch.cuda._sleep(1000)
        with strategy.step():
            with torch.autocast("cuda", torch.bfloat16):
                output = model(batch)
            loss = output.float().square().mean()
            half = torch.cuda.Event(enable_timing=True)
            half.record()
            if is_managed:
                torch.cuda.synchronize()
                found["before_backward"] = last_prefetch_locations()
                found["pointers"] = count_managed(WatchedDriver.addresses)
            loss.backward()
        torch.cuda.synchronize()
    WatchedDriver.clock = None
    if is_managed:
        found["after_backward"] = last_prefetch_locations()
    return clock.read() + kernels(profiler.events(), clock.seconds_to(half))


def one_strategy(
    name: str, fresh: nn.Module, budget_bytes: int
) -> tuple[list[Span], dict[str, object]]:
    gc.collect()  # what an earlier strategy left to the collector may be managed memory
    torch.cuda.empty_cache()
    model = deepcopy(fresh).cuda().train().to(memory_format=torch.channels_last)
    batch = torch.randn(BATCH_SIZE, 3, RES, RES, device="cuda")
    batch = batch.contiguous(memory_format=torch.channels_last)
    limit_bytes = min(MANAGED_LIMIT_BYTES, torch.cuda.mem_get_info()[0] // 4)
    strategy = memory.create(
        name, device="cuda", host_budget=limit_bytes, device_budget=budget_bytes
    )
    found: dict[str, object] = {}
    try:
        with torch.autocast("cuda", torch.bfloat16):
            strategy.prepare(model, batch)
        for _ in range(N_WARM_UP_STEPS):
            with strategy.step():
                with torch.autocast("cuda", torch.bfloat16):
                    output = model(batch)
                output.float().square().mean().backward()
            model.zero_grad()
        WatchedDriver.locations.clear()
        WatchedDriver.addresses.clear()
        spans = watched_step(strategy, model, batch, found)
    finally:
        strategy.close()
        torch.cuda.synchronize()
    found["swap_out"] = overlap(spans, "swap-out")
    found["swap_in"] = overlap(spans, "swap-in")
    return spans, found


def watch_blocks() -> None:
    """Take note of the address of every tensor that a managed pager takes."""
    move = ManagedPager.move

    def watched(self: ManagedPager, tensor: torch.Tensor, layout: Layout) -> ManagedBlock:
        WatchedDriver.addresses.append(tensor.data_ptr())
        return move(self, tensor, layout)

    ManagedPager.move = watched


def check_mechanism(picture: Path | None) -> dict[str, object]:
    """Return what each strategy did; draws the timelines."""
    watch_blocks()
    before, pool_cuda.TorchCudaDriver = pool_cuda.TorchCudaDriver, WatchedDriver
    torch.manual_seed(0)
    fresh = models.create("resnet50", in_channels=3, n_outputs=2)
    learned_bytes = 4 * sum(p.nbytes for p in fresh.parameters())
    timelines: dict[str, list[Span]] = {}
    result: dict[str, object] = {}
    try:
        for name, room_bytes in ROOM_BYTES.items():
            budget_bytes = learned_bytes + room_bytes
            timelines[name], result[name] = one_strategy(name, fresh, budget_bytes)
    finally:
        pool_cuda.TorchCudaDriver = before
    if picture is not None:
        draw_timelines({f"memory={n}": spans for n, spans in timelines.items()}, picture)
    return result


if __name__ == "__main__":
    print(json.dumps(check_mechanism(Path(sys.argv[1]) if len(sys.argv) > 1 else None), indent=1))
