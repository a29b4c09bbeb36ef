"""Memory that kernels take for themselves while they run: what they lay out anew.

Read off all allocations of single kernels and of steps of ResNet-50 and ResUNet35, on maps in
channels_last: without a GPU with torch 2.15 (oneDNN 3, AVX512 with AMX) and two threads, on an H200
with torch 2.11. Buffers are in units of an operation's own operands and results, as the tables
below say. The rest are copies of weights: in backward, without a GPU, one for each thread and one
for their sum. More threads take more, each a copy of a map's part: a calibrated machine knows what
was resident while its own convolutions ran, and the larger of both counts.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from umtrain.planning.alike import unlikeness
from umtrain.planning.profile import Profile
from umtrain.planning.step import Convolution, Operation

_ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_COPIES_OF_WEIGHTS = 3
# A strided convolution's gradient of its source takes that of its output.
_COPIES_OF_GRADIENT = 2
# In bf16 an image of few channels is padded: cuDNN to 8, oneDNN to four times what it is.
_PADDED_CHANNELS = 8
_PADDED_TIMES, _PADDED_UP_TO = 4, 4
_MOST_UNLIKE = 2.0  # of layers, for what one took to say something about the other


def scratch_bytes(operation: Operation, profile: Profile) -> list[int]:
    """Return the buffers that a kernel takes and frees, one after another."""
    if operation.convolution is not None:
        of_device = _on_gpu if profile.kind == "cuda" else _on_cpu
        found = of_device(operation, operation.convolution)
        return [*found, *_measured(operation, operation.convolution, profile)]
    if operation.name.startswith("upsample") and operation.name.endswith("backward"):
        # The gradient comes as a part of a concatenation's, and is copied.
        on_cpu_bytes = operation.written_bytes if profile.kind == "cpu" else 0
        return [operation.read_bytes + on_cpu_bytes]
    if operation.name == "native_batch_norm_backward" and profile.kind == "cpu":
        return [operation.written_bytes]
    return []


def _measured(operation: Operation, convolution: Convolution, profile: Profile) -> list[int]:
    """Return what the layer took here, or one that is like it; nothing where that is not known."""
    layers = profile.scratch_by_layer.get((operation.dtype, operation.phase), {})
    layer = convolution.layer
    nearest = min(layers, key=lambda other: unlikeness(layer, other), default=None)
    if nearest is None or unlikeness(layer, nearest) > _MOST_UNLIKE:
        return []
    n_pixels = math.prod(convolution.output)
    share = _numbers(layer, n_pixels) / _numbers(nearest, n_pixels)
    n_bytes = int(share * _scratch_at(nearest, layers[nearest], n_pixels))
    return [n_bytes] if n_bytes else []


def _scratch_at(layer: Convolution, points: Sequence[tuple[int, int]], n_pixels: int) -> float:
    """Return the bytes for maps of `n_pixels` between, or beyond, `points` of pixels and bytes.

    Below the smallest map they are its own. Beyond the largest they grow as between the last two,
    at most as the numbers that the layer reads and writes.
    """
    (first, first_bytes), (last, last_bytes) = points[0], points[-1]
    if n_pixels <= first:
        return first_bytes
    for (a, a_bytes), (b, b_bytes) in pairwise(points):
        if n_pixels <= b:
            return a_bytes + (b_bytes - a_bytes) * (n_pixels - a) / (b - a)
    most_bytes = last_bytes * _numbers(layer, n_pixels) / _numbers(layer, last)
    if len(points) == 1:
        return most_bytes
    before, before_bytes = points[-2]
    grown_bytes = (last_bytes - before_bytes) * (n_pixels - last) / (last - before)
    return min(last_bytes + max(0.0, grown_bytes), most_bytes)


def _numbers(layer: Convolution, n_pixels: int) -> int:
    """Return how many numbers a layer reads and writes for an output of `n_pixels`."""
    n_sources = n_pixels * math.prod(layer.stride) * layer.in_channels
    return n_sources + n_pixels * layer.out_channels + layer.n_weights


def _on_gpu(operation: Operation, convolution: Convolution) -> list[int]:
    found = [_weight_bytes(operation, convolution)]
    n_in = convolution.in_channels
    if operation.dtype == "bf16" and n_in < _PADDED_CHANNELS:
        found.append(_PADDED_CHANNELS * _image_bytes(operation, convolution) // n_in)
    return found


def _on_cpu(operation: Operation, convolution: Convolution) -> list[int]:
    weight_bytes = _weight_bytes(operation, convolution)
    output_bytes = math.prod(convolution.output) * convolution.out_channels * _item_bytes(operation)
    is_strided = math.prod(convolution.stride) > 1
    if operation.phase == "backward":
        found = [_COPIES_OF_WEIGHTS * weight_bytes]
        if is_strided and operation.has_source_gradient:
            found.append(_COPIES_OF_GRADIENT * output_bytes)
        return found
    found = [weight_bytes]
    if operation.dtype == "bf16" and convolution.in_channels <= _PADDED_UP_TO:
        found.append(_PADDED_TIMES * _image_bytes(operation, convolution))
    elif operation.dtype == "bf16" and is_strided:
        found.append(output_bytes)
    return found


def _item_bytes(operation: Operation) -> int:
    return _ITEM_BYTES.get(operation.dtype, 4)


def _weight_bytes(operation: Operation, convolution: Convolution) -> int:
    return convolution.n_weights * _item_bytes(operation)


def _image_bytes(operation: Operation, convolution: Convolution) -> int:
    n_pixels = math.prod(convolution.output) * math.prod(convolution.stride)
    return n_pixels * convolution.in_channels * _item_bytes(operation)
