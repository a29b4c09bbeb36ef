"""What a calibration times of whole networks: launching, and what composition makes of kernels.

Alone and over and over a kernel finds its operands in the cache and its threads awake, and nothing
calls it but a loop; in a network it finds what other kernels left, and autocast, autograd and the
library's own set-up stand before it. So small networks are trained, of one block for each stage of
a ResNet, at a size where launching counts, and at some where it does not.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from umtrain.planning.profile import CompositionSample, Profile
from umtrain.planning.seconds import kernel_seconds
from umtrain.planning.step import StepTrace
from umtrain.planning.timing import TORCH_DTYPES, left_out_if_it_does_not_fit, wall_s
from umtrain.planning.tracing import mean_square, trace_step

LAUNCHED_PX = 64
# Pixels a side: maps that fit in a processor's cache, and maps that do not; on a GPU maps that take
# longer to compute than to launch.
COMPOSED_PX = {"cpu": (256, 1024), "cuda": (4096,)}
_LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 3, 12, 1.0
_LEAST_LAUNCH_S = 1e-6


@dataclass(frozen=True)
class TimedStep:
    """A training step: its kernels one by one, and all together.

    Those in the network's dtype stand apart from `others_s`: the update, and what is always fp32.
    """

    n_operations: int
    n_bytes: int  # read and written by all but the update
    kernels_s: float
    others_s: float
    step_s: float


def traces(dtype: str, device: torch.device) -> list[StepTrace]:
    """Return a step of each network at each size: what their kernels are."""
    return [
        _trace(_made(make, torch.device("meta")), dtype, side_px)
        for side_px in (LAUNCHED_PX, *COMPOSED_PX[device.type])
        for make in _networks()
    ]


def time_networks(dtype: str, side_px: int, profile: Profile) -> list[TimedStep]:
    """Train each network for a few steps; one that does not fit is left out.

    `profile` is what the kernels were found to take alone.
    """
    found = []
    for make in _networks():
        with left_out_if_it_does_not_fit():
            trace, step = _training_step(make, dtype, side_px, torch.device(profile.kind))
            found.append(_timed(trace, dtype, median_s(step), profile))
    return found


def training_steps(
    dtype: str, side_px: int, device: torch.device
) -> list[tuple[StepTrace, Callable[[], None]]]:
    """Return for each network what a step does, and a function that does it and waits for it."""
    return [_training_step(make, dtype, side_px, device) for make in _networks()]


def launch_s(steps: Sequence[TimedStep], device_kind: str) -> float | None:
    """Return what an operation costs beside its work, by steps whose maps are small.

    Python, the dispatcher, autograd, and where there is no GPU the library's own set-up and the
    start of its threads. A GPU does the work meanwhile: None if that takes as long.
    """
    if device_kind == "cuda":
        steps = [each for each in steps if 2 * (each.kernels_s + each.others_s) < each.step_s]
    if not steps:
        return None
    beside_s = [
        each.step_s - (each.kernels_s + each.others_s if device_kind == "cpu" else 0.0)
        for each in steps
    ]
    return max(_LEAST_LAUNCH_S, sum(beside_s) / sum(each.n_operations for each in steps))


def composition(
    dtype: str, steps: Sequence[TimedStep], profile: Profile
) -> CompositionSample | None:
    """Return how many times as long kernels take in `steps` as alone, launching left out.

    None where launching may take as long as computing, or there is no step.
    """
    launching_s = {each: each.n_operations * profile.launch_s for each in steps}
    if profile.kind == "cuda":
        steps = [each for each in steps if each.step_s > 2 * launching_s[each]]
        launching_s = dict.fromkeys(steps, 0.0)
    in_network_s = sum(each.step_s - each.others_s - launching_s[each] for each in steps)
    if not steps or in_network_s <= 0:
        return None
    n_bytes = sum(each.n_bytes for each in steps) // sum(each.n_operations for each in steps)
    return CompositionSample(dtype, n_bytes, in_network_s / sum(each.kernels_s for each in steps))


def _networks() -> list[Callable[[], nn.Module]]:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    return [partial(ResNet, block, [1, 1, 1, 1]) for block in (BasicBlock, Bottleneck)]


def _made(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    with device:
        return make().to(memory_format=torch.channels_last)


def _trace(model: nn.Module, dtype: str, side_px: int) -> StepTrace:
    return trace_step(model, _image(dtype, side_px, torch.device("meta")), precision=dtype)


def _image(dtype: str, side_px: int, device: torch.device) -> Tensor:
    x = torch.ones(1, 3, side_px, side_px, device=device, dtype=TORCH_DTYPES[dtype])
    return x.to(memory_format=torch.channels_last)


def _training_step(
    make: Callable[[], nn.Module], dtype: str, side_px: int, device: torch.device
) -> tuple[StepTrace, Callable[[], None]]:
    model = _made(make, device)
    x = _image(dtype, side_px, device).normal_()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            output = model(x)
        torch.autograd.backward(mean_square(output))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _trace(model, dtype, side_px), step


def _timed(trace: StepTrace, dtype: str, step_s: float, profile: Profile) -> TimedStep:
    computing = [each for each in trace.operations if each.phase != "optimizer"]
    all_s = sum(kernel_seconds(each, profile) for each in trace.operations)
    kernels_s = sum(kernel_seconds(each, profile) for each in computing if each.dtype == dtype)
    return TimedStep(
        n_operations=len(trace.operations),
        n_bytes=sum(each.read_bytes + each.written_bytes for each in computing),
        kernels_s=kernels_s,
        others_s=all_s - kernels_s,
        step_s=step_s,
    )


def median_s(step: Callable[[], Any]) -> float:
    """Return the median seconds of a few steps, after one that is left out."""
    step()
    times_s: list[float] = []
    while len(times_s) < _LEAST_STEPS or (len(times_s) < _MOST_STEPS and sum(times_s) < _ENOUGH_S):
        times_s.append(wall_s(step))
    return statistics.median(times_s)
