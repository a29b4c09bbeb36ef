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
from umtrain.planning.timing import TORCH_DTYPES, wall_s
from umtrain.planning.tracing import mean_square, trace_step

LAUNCHED_PX = 64
# Pixels a side: maps that fit in a processor's cache, and maps that do not; on a GPU maps that take
# longer to compute than to launch.
COMPOSED_PX = {"cpu": (256, 1024), "cuda": (4096,)}
_LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 3, 12, 1.0
_LEAST_LAUNCH_S = 1e-6


@dataclass(frozen=True)
class TimedStep:
    """A training step: its kernels one by one, the update's apart from the others, and in all."""

    n_operations: int
    n_bytes: int  # read and written by all but the update
    kernels_s: float
    update_s: float
    step_s: float


def traces(dtype: str, device: torch.device) -> list[StepTrace]:
    """Return a step of each network at each size: what their kernels are."""
    return [
        _trace(_on_device(make(), torch.device("meta")), dtype, side_px)
        for side_px in (LAUNCHED_PX, *COMPOSED_PX[device.type])
        for make in _networks()
    ]


def time_networks(dtype: str, side_px: int, profile: Profile) -> list[TimedStep]:
    """Train each network for a few steps; one that does not fit is left out.

    `profile` is what the kernels were found to take alone.
    """
    found = []
    for make in _networks():
        try:
            found.append(_time_step(make(), dtype, side_px, profile))
        except torch.OutOfMemoryError:
            continue
    return found


def launch_s(steps: Sequence[TimedStep], device_kind: str) -> float:
    """Return what an operation costs beside its work, by steps whose maps are small.

    Python, the dispatcher, autograd, and where there is no GPU the library's own set-up and the
    start of its threads. A GPU does the work meanwhile.
    """
    beside_s = [
        each.step_s - (each.kernels_s + each.update_s if device_kind == "cpu" else 0.0)
        for each in steps
    ]
    return max(_LEAST_LAUNCH_S, sum(beside_s) / sum(each.n_operations for each in steps))


def composition(
    dtype: str, steps: Sequence[TimedStep], profile: Profile
) -> CompositionSample | None:
    """Return how many times as long kernels take in `steps` as alone, launching left out.

    None where launching may take as long as computing, or there is no step.
    """
    launching_s = [each.n_operations * profile.launch_s for each in steps]
    if profile.kind == "cuda":
        pairs = zip(steps, launching_s, strict=True)
        steps = [each for each, s in pairs if each.step_s > 2 * s]
        launching_s = [0.0] * len(steps)
    in_network_s = sum(each.step_s - each.update_s for each in steps) - sum(launching_s)
    if not steps or in_network_s <= 0:
        return None
    n_bytes = sum(each.n_bytes for each in steps) // sum(each.n_operations for each in steps)
    return CompositionSample(dtype, n_bytes, in_network_s / sum(each.kernels_s for each in steps))


def _networks() -> list[Callable[[], nn.Module]]:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    return [partial(ResNet, block, [1, 1, 1, 1]) for block in (BasicBlock, Bottleneck)]


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).to(memory_format=torch.channels_last)


def _trace(model: nn.Module, dtype: str, side_px: int) -> StepTrace:
    return trace_step(model, _image(dtype, side_px, torch.device("meta")), precision=dtype)


def _image(dtype: str, side_px: int, device: torch.device) -> Tensor:
    x = torch.ones(1, 3, side_px, side_px, device=device, dtype=TORCH_DTYPES[dtype])
    return x.to(memory_format=torch.channels_last)


def _time_step(model: nn.Module, dtype: str, side_px: int, profile: Profile) -> TimedStep:
    device = torch.device(profile.kind)
    model = _on_device(model, device)
    trace = _trace(model, dtype, side_px)
    others = [each for each in trace.operations if each.phase != "optimizer"]
    updates = [each for each in trace.operations if each.phase == "optimizer"]
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

    return TimedStep(
        n_operations=len(trace.operations),
        n_bytes=sum(each.read_bytes + each.written_bytes for each in others),
        kernels_s=sum(kernel_seconds(each, profile) for each in others),
        update_s=sum(kernel_seconds(each, profile) for each in updates),
        step_s=_median_s(step),
    )


def _median_s(step: Callable[[], Any]) -> float:
    """Return the median seconds of a few steps, after one that is left out."""
    step()
    times_s: list[float] = []
    while len(times_s) < _LEAST_STEPS or (len(times_s) < _MOST_STEPS and sum(times_s) < _ENOUGH_S):
        times_s.append(wall_s(step))
    return statistics.median(times_s)
