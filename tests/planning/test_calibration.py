"""Calibration measures real kernels once, keeps them, and never measures unasked."""

import dataclasses
import json
import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umtrain.errors import ConfigError, OutOfMemoryError
from umtrain.memory import allocator
from umtrain.planning import calibration, timing, timing_networks, timing_swapping
from umtrain.planning.calibration import (
    calibrated,
    local_profile,
    machine_key,
    migration_of,
)
from umtrain.planning.profile import load_profile, profile_names
from umtrain.planning.seconds import operation_seconds
from umtrain.planning.timing_networks import COMPOSED_PX, TimedStep, TrainedNetwork
from umtrain.planning.timing_swapping import fit_costs
from umtrain.planning.tracing import trace_step

CPU = torch.device("cpu")


def a_step():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False),
    ).to(memory_format=torch.channels_last)
    image = torch.empty(1, 3, 64, 64, memory_format=torch.channels_last)
    return trace_step(model, image, precision="fp32")


def a_network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
    )


def trained(dtypes, sides_px, device):
    return [TrainedNetwork(a_network, d, px, device) for d in dtypes for px in sides_px]


@pytest.fixture(scope="module", autouse=True)
def small_steps_are_timed():
    """Swap maps of 64 KiB, and train two layers on a few pixels: real ones take a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing_swapping, "_SWAPPED", ((8, 2),))
        patch.setattr(timing_swapping, "_N_TIMES", 1)
        patch.setattr(calibration, "trained_networks", trained)
        patch.setattr(calibration, "LAUNCHED_PX", 8)
        patch.setitem(COMPOSED_PX, "cpu", (128, 256))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def profile(folder, told):
    return calibrated(
        CPU,
        folder,
        lambda: [a_step()],
        spill_dir=None,
        again=False,
        progress=lambda done, total, note: told.append((done, total)),
    )


def test_each_convolution_of_the_steps_is_timed_in_each_dtype_and_phase(profile):
    timed = {(s.dtype, s.phase, s.convolution.in_channels) for s in profile.convolution_samples}
    assert timed == {
        (dtype, phase, channels)
        for dtype in ("bf16", "fp32")
        for phase in ("forward", "backward")
        for channels in (3, 16)
    }


def test_the_first_convolution_has_no_gradient_of_its_input_to_find(profile):
    flops = {
        (s.convolution.in_channels, s.phase): s.flops
        for s in profile.convolution_samples
        if s.dtype == "fp32"
    }
    assert flops[3, "backward"] == flops[3, "forward"]
    assert flops[16, "backward"] == 2 * flops[16, "forward"]


def test_every_figure_is_positive_and_finite(profile):
    figures = [
        *(s.seconds for s in profile.convolution_samples),
        *(s.seconds for s in profile.pass_samples),
        *profile.matrix_flops_per_s.values(),
        profile.memory_bytes_per_s,
        profile.in_bytes_per_s,
        profile.out_bytes_per_s,
        profile.launch_s,
    ]
    assert all(0 < figure < math.inf for figure in figures)


@given(
    transfer_s=st.floats(0, 1e-2),
    s_per_byte=st.floats(0, 1e-8),
    amounts=st.lists(
        st.tuples(st.integers(1, 500), st.integers(2**18, 2**32)), min_size=1, max_size=6
    ),
)
def test_what_a_transfer_and_a_byte_cost_explains_what_steps_took(transfer_s, s_per_byte, amounts):
    costs_s = [n * transfer_s + n_bytes * s_per_byte for n, n_bytes in amounts]
    found = fit_costs(amounts, costs_s)
    again_s = [n * found[0] + n_bytes * found[1] for n, n_bytes in amounts]
    assert again_s == pytest.approx(costs_s, rel=1e-4, abs=1e-6)


def test_steps_that_were_no_slower_cost_nothing():
    assert fit_costs([(70, 2**25), (35, 2**28)], [-0.01, -0.002]) == (0, 0)


def test_without_room_to_swap_the_generic_machine_s_costs_are_taken(monkeypatch, caplog):
    def refuse(*arguments):
        raise OutOfMemoryError("the disk is full")

    monkeypatch.setattr(timing_swapping, "_step", refuse)
    generic = load_profile("generic_cpu")
    assert timing_swapping._costs_of_swapping(None) == (
        generic.transfer_s,
        generic.link_busy_s_per_byte,
    )
    assert "not measured, but taken from generic_cpu: the disk is full" in caplog.text


def test_a_step_that_was_timed_can_be_predicted(profile):
    seconds = [operation_seconds(operation, profile) for operation in a_step().operations]
    assert all(0 < each < 1 for each in seconds)


def test_a_slow_machine_times_some_convolutions_and_interpolates(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_CONVOLUTIONS_S", {True: 0.0, False: 0.0})
    monkeypatch.setattr(calibration, "PASS_BYTES", (2**20,))
    monkeypatch.setitem(COMPOSED_PX, "cpu", ())
    told = []
    slow = calibrated(
        CPU,
        tmp_path,
        lambda: [a_step()],
        spill_dir=None,
        again=False,
        progress=lambda done, total, note: told.append((done, total)),
    )
    timed = [(s.dtype, s.phase) for s in slow.convolution_samples]
    assert sorted(timed) == sorted(
        (d, p) for d in ("bf16", "fp32") for p in ("forward", "backward")
    )
    assert all(0 < operation_seconds(each, slow) < 1 for each in a_step().operations)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_progress_is_told_up_to_the_end(profile, told):
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


def test_what_was_measured_is_kept_and_not_measured_again(profile, folder):
    def refuse():
        raise AssertionError("measured again")

    again = calibrated(
        CPU, folder, refuse, spill_dir=None, again=False, progress=lambda *_: refuse()
    )
    assert again == profile


def test_another_machine_or_number_of_threads_is_another_calibration():
    here = machine_key(CPU, "a processor")
    assert machine_key(CPU, "a processor") == here
    assert machine_key(CPU, "another processor") != here
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads + 1)
    try:
        assert machine_key(CPU, "a processor") != here
    finally:
        torch.set_num_threads(n_threads)


def test_a_damaged_file_is_named(profile, folder, monkeypatch):
    (path,) = folder.iterdir()
    text = path.read_text()
    path.write_text(text[:100])
    try:
        monkeypatch.setenv("UMTRAIN_CACHE", str(folder))
        with pytest.raises(ConfigError, match=rf"{path.name}: is damaged .*delete it"):
            local_profile(CPU)
    finally:
        path.write_text(text)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=f"{blocked}: File exists"):
        calibrated(CPU, blocked, list, spill_dir=None, again=True, progress=lambda *_: None)


def test_without_a_calibration_this_machine_is_a_stated_one_with_its_own_memory(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("UMTRAIN_CACHE", str(tmp_path))
    here, generic = local_profile("cpu"), load_profile("generic_cpu")
    kept = {"device_bytes": generic.device_bytes, "host_bytes": generic.host_bytes}
    assert dataclasses.replace(here, **kept) == generic
    assert list(tmp_path.iterdir()) == []


def test_with_a_calibration_it_is_that_one(profile, folder, monkeypatch):
    monkeypatch.setenv("UMTRAIN_CACHE", str(folder))
    assert local_profile("cpu") == profile
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["kind"] == "cpu"


@pytest.mark.parametrize("name", [n for n in profile_names() if load_profile(n).device_names])
def test_pages_come_to_a_calibrated_gpu_as_to_the_named_one(name):
    named = load_profile(name)
    (title, *_) = named.device_names
    assert migration_of("cuda", f"NVIDIA {title}", named.device_bytes) == named.migration


def test_pages_come_to_an_unknown_gpu_block_by_block():
    unknown = migration_of("cuda", "NVIDIA of tomorrow", 2**38)
    s_per_byte = unknown.fault_s / unknown.block_bytes / unknown.n_faults
    assert 1e-4 / 2**21 <= s_per_byte <= 2e-4 / 2**21


def test_freed_buffers_are_used_again_while_it_measures_and_not_after(tmp_path, monkeypatch):
    # In training no pass over maps pays for fresh pages; timed with them it looks ten times slower.
    chosen = []

    def measure(*arguments, **options):
        chosen.append(allocator._current)
        return load_profile("generic_cpu")

    monkeypatch.setattr(calibration, "calibrate", measure)
    before = allocator._current
    calibrated(CPU, tmp_path, list, spill_dir=None, again=True, progress=lambda *_: None)
    assert chosen == [allocator.FreedBuffers.RECYCLE]
    assert allocator._current == before


def after_steps_of(monkeypatch, profile, dtype, steps_s):
    """The profile after networks took so many seconds a step, by pixels."""
    networks = trained([dtype], steps_s, CPU)
    for network in networks:
        monkeypatch.setattr(timing_networks, "wall_s", lambda step, n=network: steps_s[n.side_px])
        network.train()
    return calibration._with_networks(profile, networks)


def test_what_operations_cost_in_a_network_is_measured_on_small_maps_and_large(
    profile, monkeypatch
):
    found = after_steps_of(monkeypatch, profile, "fp32", {8: 1.0, 128: 20.0, 256: 30.0})
    small, large = found.composition_samples
    assert small.n_bytes < large.n_bytes


def test_steps_of_networks_count_with_the_median_of_all_times_but_the_first_ones(monkeypatch):
    (network,) = trained(["fp32"], [8], CPU)
    # Settling ends with two steps or half a second, counting with five or half a second.
    each_time = [[0.2, 0.4], [0.3, 0.25], [9.0], [0.7], [0.3, 0.1], [0.15, *[0.05] * 4]]
    times_s = iter(chain.from_iterable(each_time))
    monkeypatch.setattr(timing_networks, "wall_s", lambda step: next(times_s))
    for _ in range(3):
        network.train()
    assert list(times_s) == []
    assert network.timed(load_profile("generic_cpu")).step_s == 0.1


def test_without_memory_for_a_network_the_fix_is_named(profile):
    networks = trained(["fp32"], [8], CPU)
    for network in networks:
        network.step = lambda: torch.empty(2**60, dtype=torch.uint8)
        network.train()
        network.train()
    with pytest.raises(OutOfMemoryError, match=r"to measure a network in; .* device=\.\.\."):
        calibration._with_networks(profile, networks)


def test_an_error_that_is_not_about_memory_is_not_taken_for_one():
    def refuse():
        raise RuntimeError("shapes do not match")

    (network,) = trained(["fp32"], [8], CPU)
    network.step = refuse
    with pytest.raises(RuntimeError, match="shapes do not match"):
        network.train()


def test_the_networks_that_were_trained_are_timed_kernel_by_kernel_too(profile):
    sides = {s.convolution.output[-1] for s in profile.convolution_samples if s.dtype == "fp32"}
    assert sides == {64, 8, 128, 256}  # of the step that was asked for, and of the network's


def seconds_of_training(profile, dtype, side_px):
    image = torch.empty(1, 3, side_px, side_px, device="meta")
    kind = timing.TORCH_DTYPES[dtype]
    image = image.to(kind, memory_format=torch.channels_last)
    model = a_network().to(memory_format=torch.channels_last)
    operations = trace_step(model, image, precision=dtype).operations
    return sum(operation_seconds(each, profile) for each in operations)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("launching_s", [1e-4, 3e-3])
def test_networks_that_were_trained_are_predicted_to_take_as_long_as_they_did(
    profile, monkeypatch, launching_s, dtype
):
    kernels = dataclasses.replace(profile, composition_samples=(), launch_s=0.0)
    small_s = seconds_of_training(kernels, dtype, 8) + launching_s
    large_s = {px: 1.5 * seconds_of_training(kernels, dtype, px) + launching_s for px in (64, 512)}
    known = after_steps_of(monkeypatch, kernels, dtype, {8: small_s, **large_s})
    for side_px, step_s in large_s.items():
        assert seconds_of_training(known, dtype, side_px) == pytest.approx(step_s, rel=1e-6)
    launched = dataclasses.replace(known, composition_samples=())
    assert seconds_of_training(launched, dtype, 8) == pytest.approx(small_s, rel=1e-6)


def a_step_of(step_s, kernels_s=1e-3):
    return [TimedStep(100, ((2**20, kernels_s),), others_s=0.0, step_s=step_s)]


def test_a_gpu_that_waits_for_launches_says_nothing_about_kernels():
    gpu = load_profile("h200")
    launched = dataclasses.replace(gpu, launch_s=timing_networks.launch_s(a_step_of(3e-3), "cuda"))
    assert launched.launch_s == pytest.approx(3e-3 / 100)  # kernels run while others are launched
    steps = [a_step_of(5e-3), a_step_of(7e-3)]
    (sample,) = timing_networks.compositions("bf16", steps, launched)
    assert sample.ratio == pytest.approx(7)


def test_a_gpu_that_computes_as_long_as_it_is_launched_says_nothing_about_launching():
    assert timing_networks.launch_s(a_step_of(3e-3, kernels_s=2e-3), "cuda") is None


@pytest.mark.parametrize("fitting_channels", [3, 0])
def test_a_convolution_that_does_not_fit_is_left_out(tmp_path, monkeypatch, fitting_channels):
    take = calibration.time_convolution

    def refuse(dtype, shape, *rest):
        if shape.in_channels > fitting_channels:
            raise torch.OutOfMemoryError("out of memory")
        return take(dtype, shape, *rest)

    def measure():
        return calibrated(
            CPU, tmp_path, lambda: [a_step()], spill_dir=None, again=True, progress=lambda *_: None
        )

    monkeypatch.setattr(calibration, "time_convolution", refuse)
    monkeypatch.setattr(calibration, "PASS_BYTES", (2**20,))
    monkeypatch.setitem(COMPOSED_PX, "cpu", ())
    if fitting_channels:
        channels = {s.convolution.in_channels for s in measure().convolution_samples}
        assert channels == {fitting_channels}
        return
    with pytest.raises(OutOfMemoryError, match="no memory free to measure"):
        measure()
    assert list(tmp_path.iterdir()) == []


def test_a_gpus_kernels_wait_behind_other_work_until_all_are_launched(monkeypatch):
    # Without that a kernel that is shorter than its launch is timed as long as it.
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 16.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "_keep_busy", lambda device: told.append("busy"))
    seconds = timing._seconds(lambda: told.append("run"), torch.device("cuda"))
    assert told == ["busy", "event", *["run"] * 8, "event", "wait"]
    assert seconds == pytest.approx(16e-3 / 8)


def test_a_kernel_takes_its_least_time_and_its_first_does_not_count(monkeypatch):
    times_s = [9.0, 0.3, 0.1, 0.2, 0.05]
    monkeypatch.setattr(timing, "_seconds", lambda run, device: times_s.pop(0))
    assert timing.least_s(None, CPU) == 0.1
    assert times_s == [0.05]  # half a second is enough
