"""What kernels take beside their operands and results, against what they really take."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umtrain.memory.allocator import FreedBuffers, set_freed_buffers
from umtrain.memory.linux import process_status, reset_peak_rss
from umtrain.planning import timing
from umtrain.planning.profile import ConvolutionSample, load_profile
from umtrain.planning.residence import residence_of
from umtrain.planning.scratch import scratch_bytes
from umtrain.planning.step import Convolution, Operation
from umtrain.planning.tracing import trace_step
from umtrain.planning.usage import kept

CPU, GPU = load_profile("generic_cpu"), load_profile("h200")

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
    assert taken <= max(scratch_bytes(operation, CPU)) + half_a_map


def test_a_convolution_of_few_channels_is_padded_in_bf16():
    convolution = a_convolution(in_channels=3, kernel=(7, 7), stride=(2, 2))
    image_bytes = 2 * 3 * SIDE * SIDE
    bf16, fp32 = (an_operation("convolution", dtype, convolution) for dtype in ("bf16", "fp32"))
    assert max(scratch_bytes(bf16, CPU)) == 4 * image_bytes
    assert max(scratch_bytes(bf16, GPU)) == 8 * image_bytes // 3
    assert max(scratch_bytes(fp32, GPU)) < image_bytes


def test_a_strided_convolutions_source_gradient_takes_its_outputs_twice():
    convolution = a_convolution(stride=(2, 2))
    output_bytes = 4 * CHANNELS * math.prod(convolution.output)
    backward = an_operation("convolution_backward", convolution=convolution)
    assert max(scratch_bytes(backward, CPU)) == 2 * output_bytes
    first = an_operation("convolution_backward", convolution=convolution, n_gradients=1)
    assert max(scratch_bytes(first, CPU)) < output_bytes


def test_upsampling_copies_the_gradient_that_it_is_given_a_part_of():
    backward = an_operation("upsample_nearest2d_backward")
    assert scratch_bytes(backward, GPU) == [backward.read_bytes]
    assert scratch_bytes(backward, CPU) == [backward.read_bytes + backward.written_bytes]


@pytest.mark.parametrize("profile", [CPU, GPU])
def test_what_goes_pixel_by_pixel_takes_nothing(profile):
    assert scratch_bytes(an_operation("add"), profile) == []


def calibrated(*measured):
    """A processor on which convolutions took so many bytes forward, and backward nothing."""
    samples = [
        ConvolutionSample("fp32", phase, shape, shape.flops, 1.0, n_bytes * (phase == "forward"))
        for shape, n_bytes in measured
        for phase in ("forward", "backward")
    ]
    return dataclasses.replace(CPU, convolution_samples=tuple(samples))


def test_a_convolution_takes_here_what_it_took_when_this_machine_was_calibrated():
    profile = calibrated((a_convolution(), 7 * MIB), (a_convolution(stride=(2, 2)), MIB))
    forward = an_operation("convolution", convolution=a_convolution())
    assert max(scratch_bytes(forward, profile)) == 7 * MIB
    for unknown in (
        an_operation("convolution_backward", convolution=a_convolution()),
        dataclasses.replace(forward, dtype="bf16"),
        an_operation("convolution", convolution=a_convolution(in_channels=1024, kernel=(7, 7))),
    ):
        assert scratch_bytes(unknown, profile) == scratch_bytes(unknown, CPU)


def test_a_layer_that_was_not_measured_takes_its_share_of_the_one_most_like_it():
    measured = a_convolution(in_channels=32)
    wider = dataclasses.replace(measured, in_channels=64, out_channels=64)
    profile = calibrated((measured, 8 * MIB), (a_convolution(kernel=(1, 1)), 100 * MIB))
    taken = scratch_bytes(an_operation("convolution", convolution=wider), profile)[-1]
    assert taken == pytest.approx(2 * 8 * MIB, rel=0.01)  # twice the channels on either side


points = st.dictionaries(st.integers(1, 2**12), st.integers(0, 2**32), min_size=1, max_size=4)


@given(points, st.integers(1, 2**14))
def test_scratch_lies_between_two_sizes_and_beyond_the_last_grows_as_maps_do_at_most(found, n):
    def shape(n_pixels):
        return Convolution(32, CHANNELS, (1, 1), (1, 1), 1, (1, n_pixels, 1))

    profile = calibrated(*((shape(pixels), n_bytes) for pixels, n_bytes in found.items()))

    def taken(n_pixels):
        # Beside a copy of the weights, which is nothing that was measured.
        operation = an_operation("convolution", convolution=shape(n_pixels))
        return sum(scratch_bytes(operation, profile)) - sum(scratch_bytes(operation, CPU))

    assert all(taken(pixels) == n_bytes for pixels, n_bytes in found.items())
    below = [found[pixels] for pixels in sorted(found) if pixels <= n][-1:]
    above = [found[pixels] for pixels in sorted(found) if pixels >= n][:1]
    if below and above:
        assert min(below + above) <= taken(n) <= max(below + above)
    elif above:
        assert taken(n) == above[0]
    else:
        assert below[0] <= taken(n) <= below[0] * (n / max(found)) + 1


def test_what_a_run_takes_beside_its_results_is_measured():
    def run():
        torch.ones(64 * MIB, dtype=torch.uint8)
        return [torch.ones(16 * MIB, dtype=torch.uint8)]

    taken = timing._scratch_bytes(run, torch.device("cpu"))
    if taken is None:
        pytest.skip("the kernel does not let the peak of the resident set be reset")
    assert taken == pytest.approx(48 * MIB, abs=4 * MIB)  # the result comes where the other was


def test_the_peak_of_a_step_holds_what_its_kernels_were_measured_to_take():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU())
    trace = trace_step(model, torch.empty(1, 3, 64, 64, device="meta"), precision="fp32")
    (shape,) = {o.convolution for o in trace.operations if o.convolution}
    peaks = [
        residence_of(kept(trace), calibrated((shape, n_bytes)), is_budgeted=False).peak_bytes
        for n_bytes in (100 * MIB, 300 * MIB)
    ]
    assert peaks[1] - peaks[0] == 200 * MIB
