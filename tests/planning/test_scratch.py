"""What kernels take beside their operands and results, against what they really take."""

import math

import pytest
import torch

from umtrain.memory.allocator import FreedBuffers, set_freed_buffers
from umtrain.memory.linux import process_status, reset_peak_rss
from umtrain.planning.scratch import scratch_bytes
from umtrain.planning.step import Convolution, Operation

SIDE, CHANNELS = 512, 32
MIB = 2**20
_aten = torch.ops.aten


def an_operation(name, dtype="fp32", convolution=None, n_bytes=64 * MIB, n_gradients=2):
    phase = "backward" if name.endswith("backward") else "forward"
    flops = 0.0 if convolution is None else convolution.flops
    flops *= n_gradients if phase == "backward" else 1
    return Operation(name, "", phase, dtype, flops, 2 * n_bytes, n_bytes, convolution)


def a_convolution(in_channels=CHANNELS, kernel=(3, 3), stride=(1, 1)):
    output = (1, SIDE // stride[0], SIDE // stride[1])
    return Convolution(in_channels, CHANNELS, kernel, stride, 1, output)


def a_map():
    x = torch.ones(1, CHANNELS, SIDE, SIDE).to(memory_format=torch.channels_last)
    assert x.nbytes == 32 * MIB
    return x


def norm_backward():
    x, dy = a_map(), a_map()
    ones = torch.ones(CHANNELS)
    arguments = dy, x, ones, ones, ones, ones, ones, True, 1e-5, [True, True, True]
    operation = an_operation("native_batch_norm_backward", n_bytes=x.nbytes)
    return (lambda: _aten.native_batch_norm_backward(*arguments)), operation


def convolution_backward():
    x, dy = a_map(), a_map()
    weight = torch.ones(CHANNELS, CHANNELS, 3, 3).to(memory_format=torch.channels_last)
    geometry = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    operation = an_operation("convolution_backward", convolution=a_convolution())
    return (lambda: _aten.convolution_backward(dy, x, weight, *geometry)), operation


@pytest.fixture
def fresh_buffers():
    before, n_threads = set_freed_buffers(FreedBuffers.GIVE_BACK), torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)
    set_freed_buffers(before)


@pytest.mark.parametrize("make", [norm_backward, convolution_backward])
def test_a_kernel_touches_no_more_beside_its_result_than_is_said(fresh_buffers, make):
    run, operation = make()
    run()  # threads and compiled kernels are there from now on
    if not reset_peak_rss():
        pytest.skip("the kernel does not let the peak of the resident set be reset")
    before = process_status()["VmRSS"]
    results = [each for each in run() if each is not None]
    taken = process_status()["VmHWM"] - before - sum(each.nbytes for each in results)
    half_a_map = 16 * MIB
    assert taken <= max(scratch_bytes(operation, "cpu")) + half_a_map


def test_a_convolution_of_few_channels_is_padded_in_bf16():
    convolution = a_convolution(in_channels=3, kernel=(7, 7), stride=(2, 2))
    image_bytes = 2 * 3 * SIDE * SIDE
    bf16, fp32 = (an_operation("convolution", dtype, convolution) for dtype in ("bf16", "fp32"))
    assert max(scratch_bytes(bf16, "cpu")) == 4 * image_bytes
    assert max(scratch_bytes(bf16, "cuda")) == 8 * image_bytes // 3
    assert max(scratch_bytes(fp32, "cuda")) < image_bytes


def test_a_strided_convolutions_source_gradient_takes_its_outputs_twice():
    convolution = a_convolution(stride=(2, 2))
    output_bytes = 4 * CHANNELS * math.prod(convolution.output)
    backward = an_operation("convolution_backward", convolution=convolution)
    assert max(scratch_bytes(backward, "cpu")) == 2 * output_bytes
    first = an_operation("convolution_backward", convolution=convolution, n_gradients=1)
    assert max(scratch_bytes(first, "cpu")) < output_bytes


def test_upsampling_copies_the_gradient_that_it_is_given_a_part_of():
    backward = an_operation("upsample_nearest2d_backward")
    assert scratch_bytes(backward, "cuda") == [backward.read_bytes]
    assert scratch_bytes(backward, "cpu") == [backward.read_bytes + backward.written_bytes]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_goes_pixel_by_pixel_takes_nothing(kind):
    assert scratch_bytes(an_operation("add"), kind) == []
