"""What a calibration times: a machine's own convolutions, passes, products and memory.

A kernel's figure is the least of a few runs after one that is left out: what else a machine does
only makes a run longer. On a GPU a run is one of several that wait in its queue behind other work,
so that kernels are timed, not their launches.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from umtrain.memory.allocator import give_back_free_memory, giving_back
from umtrain.memory.budget import is_out_of_memory
from umtrain.memory.linux import process_status, reset_peak_rss
from umtrain.planning.profile import ConvolutionSample, PassSample
from umtrain.planning.step import Convolution, Phase, StepTrace

_aten = torch.ops.aten
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PASS_BYTES = (2 * 2**20, 2**27)  # in the cache of a core, and out of it
_MOST_TIMES, _ENOUGH_S = 6, 0.5
PROBE_BYTES = 2**28
_N_FRESH = 10
_N_IN_A_ROW = 8
_BUSY_SIDE, _BUSY_S = 2048, 5e-3
_CHANNELS = 128  # of maps that are passed over: ResNet-50 has 64 to 2048
_UPDATED_SHAPE = 256, 256, 3, 3


@contextmanager
def left_out_if_it_does_not_fit() -> Iterator[None]:
    """End the block without an error where memory runs out in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def distinct_convolutions(steps: Iterable[StepTrace]) -> list[tuple[Convolution, bool]]:
    """Return each convolution once, and whether its input has a gradient."""
    with_gradient: dict[Convolution, bool] = {}
    for step in steps:
        for operation in step.operations:
            shape = operation.convolution
            if shape is None or operation.phase != "backward":
                continue
            has_source_gradient = with_gradient.get(shape, False) or operation.has_source_gradient
            with_gradient[shape] = has_source_gradient
    return list(with_gradient.items())


def time_convolution(
    dtype: str, shape: Convolution, has_source_gradient: bool, device: torch.device
) -> Iterator[ConvolutionSample]:
    """Yield how long `shape` takes forward and backward, on maps of noise."""
    kind = TORCH_DTYPES[dtype]
    n_images, *sides = shape.output
    rows = [side * stride for side, stride in zip(sides, shape.stride, strict=True)]
    padding = [side // 2 for side in shape.kernel]
    memory_format = torch.channels_last if len(sides) == 2 else torch.channels_last_3d
    x = torch.randn(n_images, shape.in_channels, *rows, device=device, dtype=kind)
    weight = torch.randn(
        shape.out_channels, shape.in_channels // shape.groups, *shape.kernel, device=device
    )
    x, weight = x.to(memory_format=memory_format), weight.to(kind, memory_format=memory_format)
    ones = [1] * len(sides)
    geometry = (list(shape.stride), padding, ones, False, [0] * len(sides), shape.groups)

    def forward() -> list[Tensor | None]:
        return [_aten.convolution(x, weight, None, *geometry)]

    dy = torch.randn_like(_aten.convolution(x, weight, None, *geometry))

    def backward() -> list[Tensor | None]:
        wanted = [has_source_gradient, True, False]
        found = _aten.convolution_backward(dy, x, weight, None, *geometry, wanted)
        return list(found)

    twice = 2.0 if has_source_gradient else 1.0
    runs: tuple[tuple[Phase, float, Callable[[], list[Tensor | None]]], ...] = (
        ("forward", shape.flops, forward),
        ("backward", twice * shape.flops, backward),
    )
    for phase, flops, run in runs:
        seconds = least_s(run, device)
        yield ConvolutionSample(dtype, phase, shape, flops, seconds, _scratch_bytes(run, device))


def _scratch_bytes(run: Callable[[], list[Tensor | None]], device: torch.device) -> int | None:
    """Return what is resident at most beside `run`'s results, after a first run; None on a GPU."""
    if device.type == "cuda":
        return None
    give_back_free_memory()
    before_bytes = process_status().get("VmRSS")
    if before_bytes is None or not reset_peak_rss():
        return None
    results_bytes = sum(each.nbytes for each in run() if each is not None)
    return max(0, process_status()["VmHWM"] - before_bytes - results_bytes)


def time_passes(dtype: str, n_bytes: int, device: torch.device) -> Iterator[PassSample]:
    """Time each kind of pass on a map of `n_bytes`; its traffic is counted as a trace counts it."""
    kind = TORCH_DTYPES[dtype]
    side = int((n_bytes / kind.itemsize / _CHANNELS) ** 0.5)
    x = torch.randn(1, _CHANNELS, side, side, device=device, dtype=kind)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randn_like(x)
    weight = torch.ones(_CHANNELS, device=device)
    bias = torch.zeros(_CHANNELS, device=device)
    mean, variance = bias.clone(), weight.clone()
    x_in, weight_in, bias_in = (t.clone().requires_grad_() for t in (x, weight, bias))
    learned = (x_in, weight_in, bias_in)
    normed = _batch_norm(x_in, weight_in, bias_in, mean, variance)
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    small = x[:, :, : side // 2, : side // 2].contiguous(memory_format=torch.channels_last)
    one = x.nbytes
    other = torch.float32 if kind == torch.bfloat16 else torch.bfloat16
    passes: dict[str, tuple[Callable[[], Any], float]] = {
        "elementwise": (lambda: x + y, 3 * one),
        "in_place": (lambda: torch.relu_(x), 2 * one),
        "rectify_backward": (lambda: _aten.threshold_backward(y, x, 0), 3 * one),
        "norm": (lambda: _batch_norm(x, weight, bias, mean, variance), 2 * one),
        "norm_backward": (
            lambda: torch.autograd.grad(normed, learned, y, retain_graph=True),
            3 * one,
        ),
        "pool": (
            lambda: _aten.max_pool2d_with_indices(x, *geometry),
            one + one / 4 + 8 * x.numel() / 4,
        ),
        "upsample": (lambda: _aten.upsample_nearest2d(small, [side, side]), one + small.nbytes),
        "cast": (lambda: x.to(other), one + x.numel() * other.itemsize),
    }
    for name, (run, moved) in passes.items():
        yield PassSample(name, dtype, int(moved), least_s(run, device))
    if kind == torch.float32:
        yield _time_update(one, device)


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalise as a network in training does, with the library's kernel that torch chooses."""
    return functional.batch_norm(x, mean, variance, weight, bias, training=True)


def _time_update(n_bytes: int, device: torch.device) -> PassSample:
    """Time AdamW's update of about `n_bytes` of weights, laid out as those of convolutions are."""
    weight = torch.ones(_UPDATED_SHAPE, device=device).to(memory_format=torch.channels_last)
    n_weights = max(1, n_bytes // weight.nbytes)
    weights, gradients, moments, squares = (
        [weight.clone() for _ in range(n_weights)] for _ in range(4)
    )
    steps = [torch.ones((), device=device) for _ in weights]

    def run() -> None:
        torch._fused_adamw_(
            weights,
            gradients,
            moments,
            squares,
            [],
            steps,
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    # Read: all four. Written: all but the gradients.
    return PassSample("update", "fp32", 7 * n_weights * weight.nbytes, least_s(run, device))


def least_s(run: Callable[[], Any], device: torch.device) -> float:
    """Return the least seconds of a few runs of `run`, after one that is left out."""
    _seconds(run, device)
    found = [_seconds(run, device)]
    while len(found) < _MOST_TIMES and sum(found) < _ENOUGH_S:
        found.append(_seconds(run, device))
    return min(found)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a run; on a GPU of one of several in a row, launched ahead of it."""
    if device.type == "cpu":
        return wall_s(run)
    _keep_busy(device)
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record()
    for _ in range(_N_IN_A_ROW):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _N_IN_A_ROW


def wall_s(run: Callable[[], Any]) -> float:
    """Return the seconds until `run` returns, which on a GPU may be before its kernels end."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def _keep_busy(device: torch.device) -> None:
    """Give a GPU some milliseconds of work, while which runs can be put into its queue."""
    a = torch.ones(_BUSY_SIDE, _BUSY_SIDE, device=device)
    for _ in range(_n_products(device)):
        a @ a


@cache
def _n_products(device: torch.device) -> int:
    """Return how many products keep a GPU busy for long enough."""
    a = torch.ones(_BUSY_SIDE, _BUSY_SIDE, device=device)

    def run() -> None:
        for _ in range(_N_IN_A_ROW):
            a @ a
        torch.cuda.synchronize(device)

    run()
    run_s = statistics.median(wall_s(run) for _ in range(_MOST_TIMES))
    return math.ceil(_BUSY_S / (run_s / _N_IN_A_ROW))


def matrix_rate(dtype: str, device: torch.device, *, is_native: bool) -> float:
    """Return the flops/s of a dense product; a small one where `dtype` is imitated."""
    side = 8192 if device.type == "cuda" else 1536 if is_native else 192
    a = torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype])
    return float(2 * side**3 / least_s(lambda: a @ a, device))


@dataclass(frozen=True)
class Memory:
    """Sizes, the speed of a copy (bytes read and written), and what fresh memory costs on top."""

    device_bytes: int
    host_bytes: int
    bytes_per_s: float
    first_touch_s_per_byte: float


def measure_memory(device: torch.device) -> Memory:
    """Return what there is of memory, and how fast it is."""
    x = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bytes_per_s = 2 * PROBE_BYTES / least_s(lambda: y.copy_(x), device)
    host_bytes = psutil.virtual_memory().total
    if device.type == "cuda":
        return Memory(torch.cuda.mem_get_info()[1], host_bytes, bytes_per_s, 0.0)
    # In a virtual machine pages that no one ever had are far slower than those that this process
    # gave back, which are what a step gets: the least counts.
    filled_s = least_s(lambda: y.fill_(1), device)
    give_back_free_memory()
    with giving_back():
        fresh_s = min(_fresh_fill_s() for _ in range(_N_FRESH))
    touch_s = max(0.0, fresh_s - filled_s) / PROBE_BYTES
    return Memory(host_bytes, host_bytes, bytes_per_s, touch_s)


def _fresh_fill_s() -> float:
    """Return the seconds of filling fresh memory, and of giving it back."""
    return wall_s(lambda: torch.empty(PROBE_BYTES, dtype=torch.uint8).fill_(1))
