"""Memory that kernels take for themselves while they run: what a convolution lays out anew.

On a GPU that is little: an H100 took at most 18 MiB beside a map of 128 MiB. On the CPU it was read
off a log of all allocations of a step (oneDNN 3, two threads, AVX512 with AMX): the gradient of
weights in bf16 transposes its operands, in parts of 512 channels that are held twice where they
are fewer; in fp32 a 3×3 kernel copies one operand, a strided 1×1 its input.
"""

import math

from umtrain.planning.step import Operation

_PART_CHANNELS = 512
_MOST_COPIES = 2.0
_ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


def scratch_bytes(operation: Operation, device_kind: str) -> list[int]:
    """Return the buffers that a kernel takes and frees, one after another."""
    convolution = operation.convolution
    if convolution is None:
        return []
    item_bytes = _ITEM_BYTES.get(operation.dtype, 4)
    pixels = math.prod(convolution.output)
    strides = math.prod(convolution.stride)
    n_in, n_out = convolution.in_channels, convolution.out_channels
    input_bytes = pixels * strides * n_in * item_bytes
    output_bytes = pixels * n_out * item_bytes
    taps = math.prod(convolution.kernel)
    weight_bytes = taps * n_in * n_out // convolution.groups * item_bytes
    if operation.name == "convolution" or device_kind == "cuda":
        return [weight_bytes]
    if operation.dtype == "bf16":
        copies_in = min(_MOST_COPIES, _PART_CHANNELS / 2 / n_in)
        copies_out = min(_MOST_COPIES, _PART_CHANNELS / n_out)
        return [weight_bytes, int(copies_in * input_bytes + copies_out * output_bytes)]
    if taps > 1:
        return [weight_bytes, output_bytes]
    return [weight_bytes, input_bytes if strides > 1 else 0]
