"""What a calibration times of whole networks: launching, and what composition makes of kernels.

Alone and over and over a kernel finds its operands in the cache and its threads awake, and nothing
calls it but a loop; in a network it finds what other kernels left, and autocast, autograd and the
library's own set-up stand before it. So small networks are trained, of one block for each stage of
a ResNet, at a size where launching counts, and at some where it does not. They take their steps
between the kernels' runs: a machine that others use too is faster in one minute than in the next.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import nn

from umtrain.planning.profile import CompositionSample, Profile
from umtrain.planning.seconds import kernel_seconds
from umtrain.planning.timing import TORCH_DTYPES, left_out_if_it_does_not_fit, wall_s
from umtrain.planning.tracing import mean_square, trace_step

LAUNCHED_PX = 64
# Pixels a side: maps that fit in a processor's cache, and maps that do not; on a GPU maps that take
# longer to compute than to launch.
COMPOSED_PX = {"cpu": (256, 768), "cuda": (4096,)}
# Each time: steps that are left out, others were here before or nobody; and steps that count.
_SETTLING = (2, 0.5)  # at most so many, and no more once so many seconds are over
_COUNTED = (5, 0.5)
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


class TrainedNetwork:
    """A small network that takes a few steps now and then, for as long as memory suffices."""

    def __init__(
        self, make: Callable[[], nn.Module], dtype: str, side_px: int, device: torch.device
    ) -> None:
        with device:
            model = make().to(memory_format=torch.channels_last)
        x = torch.randn(1, 3, side_px, side_px, device=device, dtype=TORCH_DTYPES[dtype])
        x = x.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                output = model(x)
            torch.autograd.backward(mean_square(output))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        self.dtype, self.side_px = dtype, side_px
        self.trace = trace_step(model, x, precision=dtype)
        self.step = step
        self._fits = True
        self._times_s: list[float] = []

    def train(self) -> None:
        """Take some steps, of which the first are left out. Once memory ran out, do nothing."""
        if not self._fits:
            return
        self._fits = False
        with left_out_if_it_does_not_fit():
            _seconds_of_steps(self.step, *_SETTLING)
            self._times_s += _seconds_of_steps(self.step, *_COUNTED)
            self._fits = True

    def timed(self, profile: Profile) -> TimedStep | None:
        """Return a step, its kernels as `profile` has them alone; None if it did not fit."""
        if not self._times_s:
            return None
        operations, dtype = self.trace.operations, self.dtype
        computing = [each for each in operations if each.phase != "optimizer"]
        all_s = sum(kernel_seconds(each, profile) for each in operations)
        kernels_s = sum(kernel_seconds(each, profile) for each in computing if each.dtype == dtype)
        return TimedStep(
            n_operations=len(operations),
            n_bytes=sum(each.read_bytes + each.written_bytes for each in computing),
            kernels_s=kernels_s,
            others_s=all_s - kernels_s,
            step_s=statistics.median(self._times_s),
        )


def _seconds_of_steps(step: Callable[[], None], most: int, enough_s: float) -> list[float]:
    times_s: list[float] = []
    while len(times_s) < most and sum(times_s) < enough_s:
        times_s.append(wall_s(step))
    return times_s


def trained_networks(
    dtypes: Sequence[str], sides_px: Sequence[int], device: torch.device
) -> list[TrainedNetwork]:
    """Return each network in each dtype at each size, if there is room for its weights."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    found = []
    for dtype, side_px, block in product(dtypes, sides_px, (BasicBlock, Bottleneck)):
        with left_out_if_it_does_not_fit():
            make = partial(ResNet, block, [1, 1, 1, 1])
            found.append(TrainedNetwork(make, dtype, side_px, device))
    return found


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
