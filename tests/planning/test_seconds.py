"""Seconds of an operation: a roofline, and between the samples of a calibrated machine."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.planning.profile import (
    CompositionSample,
    ConvolutionSample,
    PassSample,
    load_profile,
)
from umtrain.planning.seconds import convolution_kind, operation_seconds, step_seconds
from umtrain.planning.step import Convolution, Operation

GPU = load_profile("a100_80gb")
SHAPE = Convolution(256, 256, (3, 3), (1, 1), 1, (1, 64, 64))
FLOPS = 2.0 * 256 * 256 * 9 * 64 * 64


def convolution(shape=SHAPE, flops=FLOPS, phase="forward", n_bytes=2**20, dtype="bf16"):
    return Operation("convolution", "", phase, dtype, flops, n_bytes, n_bytes, shape)


def a_pass(name, n_bytes, dtype="bf16"):
    return Operation(name, "", "forward", dtype, 0.0, n_bytes, n_bytes)


def with_samples(*samples, passes=()):
    profile = load_profile("generic_cpu")
    return dataclasses.replace(profile, convolution_samples=samples, pass_samples=passes)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (SHAPE, "3x3"),
        (dataclasses.replace(SHAPE, kernel=(1, 1)), "1x1"),
        (dataclasses.replace(SHAPE, kernel=(7, 7)), "large"),
        (dataclasses.replace(SHAPE, in_channels=3, kernel=(7, 7)), "few_channels"),
        (dataclasses.replace(SHAPE, groups=32), "grouped"),
        (dataclasses.replace(SHAPE, groups=256), "depthwise"),
        (dataclasses.replace(SHAPE, kernel=(3, 3, 3), output=(1, 8, 8, 8)), "3x3"),
    ],
)
def test_the_kind_of_a_convolution(shape, kind):
    assert convolution_kind(shape) == kind


def test_much_arithmetic_is_bound_by_it_and_much_traffic_by_memory():
    rate = GPU.matrix_flops_per_s["bf16"] * GPU.efficiency["3x3"]
    busy = convolution(flops=1e15, n_bytes=1)
    assert operation_seconds(busy, GPU) == pytest.approx(1e15 / rate, rel=1e-3)
    moving = convolution(flops=1.0, n_bytes=10**12)
    assert operation_seconds(moving, GPU) == pytest.approx(2e12 / GPU.memory_bytes_per_s, rel=1e-3)


@given(st.lists(st.integers(0, 2**33), max_size=30))
def test_a_gpu_computes_while_the_next_kernels_are_launched(sizes):
    operations = [a_pass("add", n_bytes) for n_bytes in sizes]
    kernels_s = sum(operation_seconds(each, GPU) for each in operations)
    launching_s = len(operations) * GPU.launch_s
    longer_s = step_seconds(operations, GPU)
    assert len(longer_s) == len(operations)
    assert all(each >= 0 for each in longer_s)
    step_s = sum(longer_s) * (1 + 1e-9) + 1e-12
    assert max(kernels_s, launching_s) <= step_s
    assert sum(longer_s) <= kernels_s + launching_s + 1e-12


def test_a_long_kernel_leaves_time_to_launch_all_that_follow():
    long_s, *others_s = step_seconds([a_pass("add", 2**34), *[a_pass("add", 0)] * 20], GPU)
    assert long_s > 20 * GPU.launch_s
    assert sum(others_s) < 1e-9


def test_short_kernels_take_as_long_as_their_launches():
    longer_s = step_seconds([a_pass("add", 0)] * 20, GPU)
    assert sum(longer_s) == pytest.approx(20 * GPU.launch_s)


def test_without_a_gpu_launching_and_computing_add_up():
    profile = load_profile("generic_cpu")
    operations = [a_pass("add", 2**20), a_pass("add", 0)]
    assert step_seconds(operations, profile) == [operation_seconds(o, profile) for o in operations]
    assert step_seconds(operations, profile)[1] == profile.launch_s


def test_backward_is_slower_than_forward_by_its_share():
    forward = operation_seconds(convolution(flops=1e15), GPU)
    backward = operation_seconds(convolution(flops=1e15, phase="backward"), GPU)
    assert backward / forward == pytest.approx(1 / GPU.backward_efficiency, rel=1e-3)


def test_a_dtype_that_is_not_known_runs_at_the_slowest_speed():
    known = operation_seconds(convolution(flops=1e15, dtype="fp64"), GPU)
    assert operation_seconds(convolution(flops=1e15, dtype="complex64"), GPU) == known


def test_what_was_timed_takes_what_it_took():
    other = dataclasses.replace(SHAPE, in_channels=64, kernel=(1, 1))
    profile = with_samples(
        ConvolutionSample("bf16", "forward", SHAPE, FLOPS, 0.025),
        ConvolutionSample("bf16", "forward", other, FLOPS, 0.5),
        ConvolutionSample("bf16", "backward", SHAPE, FLOPS, 0.9),
        ConvolutionSample("fp32", "forward", SHAPE, FLOPS, 0.7),
    )
    seconds = operation_seconds(convolution(), profile) - profile.launch_s
    assert seconds == pytest.approx(0.025, rel=0.03)


@given(
    st.lists(
        st.tuples(st.sampled_from([16, 64, 256, 1024]), st.floats(1e-4, 1.0)),
        min_size=1,
        max_size=8,
        unique_by=lambda pair: pair[0],
    ),
    st.integers(1, 4096),
)
def test_a_speed_between_samples_is_none_that_no_sample_has(samples, in_channels):
    taken = [
        ConvolutionSample(
            "bf16", "forward", dataclasses.replace(SHAPE, in_channels=channels), FLOPS, seconds
        )
        for channels, seconds in samples
    ]
    shape = dataclasses.replace(SHAPE, in_channels=in_channels)
    profile = with_samples(*taken)
    seconds = operation_seconds(convolution(shape), profile) - profile.launch_s
    times = [seconds for _, seconds in samples]
    assert min(times) * 0.999 <= seconds <= max(times) * 1.001


@given(st.integers(1, 2**34), st.floats(1e9, 1e11), st.floats(1e9, 1e11))
def test_a_pass_runs_between_the_speeds_of_the_sizes_that_were_timed(n_bytes, small, large):
    passes = (
        PassSample("norm", "bf16", 2**20, 2**20 / small),
        PassSample("norm", "bf16", 2**30, 2**30 / large),
    )
    profile = with_samples(passes=passes)
    seconds = operation_seconds(a_pass("native_batch_norm", n_bytes), profile) - profile.launch_s
    rate = 2 * n_bytes / seconds
    assert min(small, large) * 0.99 <= rate <= max(small, large) * 1.01


def test_a_normalisation_is_slower_than_an_addition_of_as_many_bytes():
    added = operation_seconds(a_pass("add", 2**30), GPU)
    assert operation_seconds(a_pass("native_batch_norm", 2**30), GPU) > added


@given(st.integers(1, 2**34), st.floats(0.5, 4), st.floats(0.5, 4))
def test_in_a_network_an_operation_takes_the_times_longer_that_were_measured(n_bytes, small, large):
    composed = (CompositionSample("bf16", 2**20, small), CompositionSample("bf16", 2**24, large))
    alone = load_profile("generic_cpu")
    profile = dataclasses.replace(alone, composition_samples=composed)
    operation = a_pass("add", n_bytes)
    kernel_s, alone_s = (operation_seconds(operation, p) - p.launch_s for p in (profile, alone))
    expected = (small, large) if 2 * n_bytes <= 2**24 else (large, 1.0)  # it reads and writes
    assert min(expected) * 0.999 <= kernel_s / alone_s <= max(expected) * 1.001


def test_what_no_cache_holds_takes_as_long_in_a_network_as_alone_but_on_a_gpu_as_measured():
    composed = (CompositionSample("bf16", 2**24, 2.0),)
    large = a_pass("add", 2**30)
    for name, ratio in (("generic_cpu", 1.0), ("h100_80gb", 2.0)):
        alone = load_profile(name)
        profile = dataclasses.replace(alone, composition_samples=composed, launch_s=1e-9)
        alone = dataclasses.replace(alone, launch_s=1e-9)
        in_network_s, alone_s = (operation_seconds(large, each) for each in (profile, alone))
        assert in_network_s / alone_s == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(("dtype", "phase"), [("fp32", "forward"), ("bf16", "optimizer")])
def test_what_was_not_timed_in_a_network_takes_as_long_as_alone(dtype, phase):
    alone = load_profile("generic_cpu")
    composed = dataclasses.replace(
        alone, composition_samples=(CompositionSample("bf16", 2**20, 3.0),)
    )
    operation = dataclasses.replace(a_pass("add", 2**24, dtype), phase=phase)
    assert operation_seconds(operation, composed) == operation_seconds(operation, alone)
