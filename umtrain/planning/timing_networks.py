"""What a calibration times of whole networks: launching, and what composition makes of kernels.

Alone and over and over a kernel finds its operands in the cache and its threads awake, and nothing
calls it but a loop; in a network it finds what other kernels left, and autocast, autograd and the
library's own set-up stand before it. So small networks are trained, of one block for each stage of
a ResNet, at a size where launching counts, and at some where it does not. They take their steps
between the kernels' runs: a machine that others use too is faster in one minute than in the next.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import nn

from umtrain.planning.profile import CompositionSample, Profile
from umtrain.planning.seconds import kernel_seconds, times_in_network
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
_N_ROUNDS = 20  # after which only rounding is left


@dataclass(frozen=True)
class TimedStep:
    """A training step: its kernels one by one, and all together.

    `kernels` are those in the network's dtype, each with what it reads and writes and its seconds;
    `others_s` is the update, and what is always fp32.
    """

    n_operations: int
    kernels: tuple[tuple[int, float], ...]
    others_s: float
    step_s: float

    @property
    def kernels_s(self) -> float:
        """Return the seconds of the kernels one by one."""
        return sum(seconds for _, seconds in self.kernels)


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
        seconds = [(each, kernel_seconds(each, profile)) for each in self.trace.operations]
        kernels = tuple(
            (each.read_bytes + each.written_bytes, each_s)
            for each, each_s in seconds
            if each.phase != "optimizer" and each.dtype == self.dtype
        )
        return TimedStep(
            n_operations=len(seconds),
            kernels=kernels,
            others_s=sum(s for _, s in seconds) - sum(s for _, s in kernels),
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


def compositions(
    dtype: str, steps_of_a_size: Iterable[Sequence[TimedStep]], profile: Profile
) -> list[CompositionSample]:
    """Return how many times as long kernels take in a network as alone, launching left out.

    A sample a size, at the mean traffic of its kernels; with what is between samples (see
    `seconds.times_in_network`) each size's steps take as long as they took. A size where launching
    may take as long as computing is left out, and one without steps.
    """
    measured = [_in_network(steps, profile) for steps in steps_of_a_size]
    known = [(kernels, all_s) for kernels, all_s in measured if kernels and all_s > 0]
    samples = [
        CompositionSample(
            dtype,
            n_bytes=sum(n_bytes for n_bytes, _ in kernels) // len(kernels),
            ratio=all_s / sum(seconds for _, seconds in kernels),
        )
        for kernels, all_s in known
    ]
    for _ in range(_N_ROUNDS):
        for i, (kernels, all_s) in enumerate(known):
            predicted_s = sum(
                seconds * times_in_network(n_bytes, samples, profile.kind)
                for n_bytes, seconds in kernels
            )
            samples[i] = replace(samples[i], ratio=samples[i].ratio * all_s / predicted_s)
    return samples


def _in_network(
    steps: Sequence[TimedStep], profile: Profile
) -> tuple[list[tuple[int, float]], float]:
    """Return the kernels of `steps`, and the seconds that all of them took in the networks."""
    launching_s = {each: each.n_operations * profile.launch_s for each in steps}
    if profile.kind == "cuda":
        steps = [each for each in steps if each.step_s > 2 * launching_s[each]]
        launching_s = dict.fromkeys(steps, 0.0)
    kernels = [kernel for each in steps for kernel in each.kernels]
    return kernels, sum(each.step_s - each.others_s - launching_s[each] for each in steps)
