"""Seconds of an operation on a machine: a roofline with measured or stated rates.

A kernel takes as long as its arithmetic or its traffic, whichever is more; see `step_seconds` for
what launching it adds. The rate of arithmetic depends on the kind of convolution, its channels and
its size: between the samples of a calibrated machine it is interpolated, elsewhere it is a share of
the data sheet's. Where it was measured, the kernel's part is multiplied by how much longer it takes
in a network; on a CPU the less, the larger its maps are.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from umtrain.planning.alike import unlikeness
from umtrain.planning.profile import CompositionSample, ConvolutionSample, PassSample, Profile
from umtrain.planning.step import Convolution, Operation

_PASS_OF = {
    "native_batch_norm": "norm",
    "cudnn_batch_norm": "norm",
    "native_group_norm": "norm",
    "native_batch_norm_backward": "norm_backward",
    "cudnn_batch_norm_backward": "norm_backward",
    "native_group_norm_backward": "norm_backward",
    "max_pool2d_with_indices": "pool",
    "max_pool3d_with_indices": "pool",
    "max_pool2d_with_indices_backward": "pool",
    "max_pool3d_with_indices_backward": "pool",
    "adaptive_max_pool2d": "pool",
    "adaptive_max_pool2d_backward": "pool",
    "upsample_nearest2d": "upsample",
    "upsample_nearest2d_backward": "upsample",
    "upsample_bilinear2d": "upsample",
    "upsample_bilinear2d_backward": "upsample",
    "relu_": "in_place",
    "threshold_backward": "rectify_backward",
    "_to_copy": "cast",
    "_fused_adamw_": "update",
}
_FEW_CHANNELS = 4
_N_NEAREST = 4
_NEAR = 0.05  # of a power of two: closer than this there is nothing to tell apart
# Traffic of an operation beyond what a cache is taken to keep of it, so that it finds as little
# there alone as in a network. On 16 cores a calibration's networks took 1.4 times their kernels at
# 9 MB an operation, and steps of ResNet-50 and ResNet-101 1.0 to 1.1 times at 60 to 80 MB.
_BEYOND_CACHES_BYTES = 128 * 2**20


def step_seconds(operations: Iterable[Operation], profile: Profile) -> list[float]:
    """Return by how many seconds each of a step's `operations` makes the step longer.

    Without a GPU each is launched and computes. A GPU computes while the next ones are launched,
    and waits for the launch of what it is done too early for.
    """
    seconds = [operation_seconds(operation, profile) for operation in operations]
    if profile.kind == "cpu":
        return seconds
    launched_s = now_s = 0.0
    longer_s = []
    for kernel_s in seconds:
        launched_s += profile.launch_s
        end_s = max(now_s, launched_s) + kernel_s
        longer_s.append(end_s - now_s)
        now_s = end_s
    return longer_s


def operation_seconds(operation: Operation, profile: Profile) -> float:
    """Return the seconds that `operation` keeps a device of `profile` busy, in a network.

    Without a GPU its launch is part of that. Memory has been touched before: fresh pages cost
    `first_touch_s_per_byte` on top.
    """
    kernel_s = kernel_seconds(operation, profile) * _composition(operation, profile)
    return kernel_s if profile.kind == "cuda" else profile.launch_s + kernel_s


def kernel_seconds(operation: Operation, profile: Profile) -> float:
    """Return the seconds of `operation` alone, over and over, without its launch."""
    if operation.convolution is not None:
        return _convolution_s(operation, operation.convolution, profile)
    n_bytes = operation.read_bytes + operation.written_bytes
    traffic_s = _pass_s(pass_kind(operation.name), operation.dtype, n_bytes, profile)
    arithmetic_s = operation.flops / _matrix_flops_per_s(operation.dtype, profile)
    return max(traffic_s, arithmetic_s)


def pass_kind(name: str) -> str:
    """Return the kind of pass over memory that aten's `name` is."""
    return _PASS_OF.get(name, "elementwise")


def convolution_kind(convolution: Convolution) -> str:
    """Return the kind of convolution that its share of a device's speed is known by."""
    in_channels, groups = convolution.in_channels, convolution.groups
    if 1 < groups == in_channels:
        return "depthwise"
    if groups > 1:
        return "grouped"
    if in_channels <= _FEW_CHANNELS:
        return "few_channels"
    if max(convolution.kernel) == 1:
        return "1x1"
    return "3x3" if max(convolution.kernel) <= 3 else "large"


def _convolution_s(operation: Operation, convolution: Convolution, profile: Profile) -> float:
    samples = [
        sample
        for sample in profile.convolution_samples
        if sample.dtype == operation.dtype and sample.phase == operation.phase
    ]
    if samples:
        return operation.flops / _sampled_flops_per_s(convolution, samples)
    rate = _matrix_flops_per_s(operation.dtype, profile)
    rate *= profile.efficiency[convolution_kind(convolution)]
    if operation.phase == "backward":
        rate *= profile.backward_efficiency
    n_bytes = operation.read_bytes + operation.written_bytes
    return max(operation.flops / rate, n_bytes / profile.memory_bytes_per_s)


def _matrix_flops_per_s(dtype: str, profile: Profile) -> float:
    """Return the speed of a dense product; what is not known runs at the slowest that is."""
    known = profile.matrix_flops_per_s
    return known[dtype] if dtype in known else min(known.values())


def _sampled_flops_per_s(convolution: Convolution, samples: Sequence[ConvolutionSample]) -> float:
    """Return the speed between the samples that are most alike, by the inverse of distance."""
    near = sorted((unlikeness(convolution, s.convolution), i) for i, s in enumerate(samples))
    nearest = [(max(distance, _NEAR), samples[i]) for distance, i in near[:_N_NEAREST]]
    weights = [1 / distance**2 for distance, _ in nearest]
    logs = [math.log(sample.flops / sample.seconds) for _, sample in nearest]
    return math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights))


def _pass_s(kind: str, dtype: str, n_bytes: int, profile: Profile) -> float:
    samples = [s for s in profile.pass_samples if s.kind == kind and s.dtype == dtype]
    if not samples:
        samples = [s for s in profile.pass_samples if s.kind == kind]
    if samples:
        return n_bytes / _sampled_bytes_per_s(n_bytes, samples)
    shares = profile.pass_efficiency
    return n_bytes / (profile.memory_bytes_per_s * shares.get(kind, shares["elementwise"]))


def _composition(operation: Operation, profile: Profile) -> float:
    """Return how many times as long an operation takes in a network as alone, 1 if not known.

    The optimizer's update finds nothing in the cache either way, and neither do maps that no
    cache keeps.
    """
    if operation.phase == "optimizer":
        return 1.0
    samples = [s for s in profile.composition_samples if s.dtype == operation.dtype]
    n_bytes = operation.read_bytes + operation.written_bytes
    return times_in_network(n_bytes, samples, profile.kind) if samples else 1.0


def times_in_network(n_bytes: int, samples: Iterable[CompositionSample], device_kind: str) -> float:
    """Return how many times as long a kernel with `n_bytes` of traffic takes as alone."""
    ratios = [(s.n_bytes, s.ratio) for s in samples]
    if device_kind == "cpu":
        ratios = [each for each in ratios if each[0] < _BEYOND_CACHES_BYTES]
        ratios.append((_BEYOND_CACHES_BYTES, 1.0))
    return _between(ratios, n_bytes)


def _sampled_bytes_per_s(n_bytes: int, samples: Sequence[PassSample]) -> float:
    return _between([(s.n_bytes, s.n_bytes / s.seconds) for s in samples], n_bytes)


def _between(figures: Sequence[tuple[int, float]], n_bytes: int) -> float:
    """Return the figure at a size: between the two nearest, by the logarithms of both."""
    points = sorted((math.log2(size), math.log(figure)) for size, figure in figures)
    at = math.log2(max(1, n_bytes))
    if at <= points[0][0]:
        return math.exp(points[0][1])
    for (x0, y0), (x1, y1) in pairwise(points):
        if at <= x1:
            return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return math.exp(points[-1][1])
