"""What each strategy is predicted to hold, and where."""

import dataclasses

import pytest
import torch
from torch import nn

from umtrain.errors import OutOfMemoryError
from umtrain.memory.options import Options
from umtrain.planning.host import Readers, check_run
from umtrain.planning.machine import free_profile
from umtrain.planning.predict import predict
from umtrain.planning.profile import load_profile
from umtrain.planning.residence import process_bytes
from umtrain.planning.subject import Subject
from umtrain.planning.usage import resident_bytes

GIB = 2**30
GPU = load_profile("v100_32gb")


@pytest.fixture(scope="module")
def subject():
    layers = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    return Subject(model, torch.empty(1, 3, 1024, 1024, device="meta"), "fp32")


def test_on_a_gpu_the_batch_is_part_of_what_is_held(subject):
    trace = subject.trace()
    batch_bytes = resident_bytes(trace, "cuda") - resident_bytes(trace, "cpu")
    assert batch_bytes == 3 * 1024 * 1024 * 4


def test_a_slide_that_is_streamed_on_a_gpu_lies_there_itself(subject):
    slide = Subject(subject.model, torch.empty(1, 3, 64, 2**24, device="meta"), "fp32")
    batch_bytes = 3 * 64 * 2**24 * 4
    wide = dataclasses.replace(GPU, device_bytes=100 * GIB, host_bytes=1000 * GIB)
    prediction = predict(slide, "stream", wide, Options(device="cuda"))
    assert prediction.fits, prediction.why
    assert prediction.device_peak_bytes > batch_bytes
    assert prediction.least_budget_bytes > batch_bytes


def test_in_ram_the_batch_leaves_less_for_the_step(subject):
    cpu = load_profile("generic_cpu")
    needed = predict(subject, "vanilla", cpu, Options()).device_peak_bytes
    tight = dataclasses.replace(cpu, device_bytes=needed + subject.trace().input_bytes)
    assert predict(subject, "vanilla", tight, Options()).fits
    tighter = dataclasses.replace(tight, device_bytes=tight.device_bytes - 1)
    assert not predict(subject, "vanilla", tighter, Options()).fits


def test_layers_in_host_memory_compute_as_slowly_as_a_processor(subject):
    options = Options(device="cuda", cpu_layers=("0", "1"))
    there = predict(subject, "placement", GPU, options)
    here = predict(subject, "vanilla", GPU, options)
    assert there.step_s > 10 * here.step_s
    assert 0 < there.host_peak_bytes < subject.trace().saved_bytes


def test_placement_needs_a_gpu(subject):
    prediction = predict(subject, "placement", load_profile("generic_cpu"), Options())
    assert not prediction.fits
    assert "between a GPU and the processor" in prediction.why


@pytest.mark.parametrize("strategy", ["um", "um_group", "um_group_prefetch"])
def test_pages_need_less_than_vanilla_though_all_stays_where_there_is_room(subject, strategy):
    cpu = load_profile("generic_cpu")
    paged, vanilla = (predict(subject, name, cpu, Options()) for name in (strategy, "vanilla"))
    assert paged.device_peak_bytes == vanilla.device_peak_bytes
    assert paged.least_budget_bytes < vanilla.least_budget_bytes


def test_what_a_gpu_pages_out_again_and_again_is_in_host_memory_once(subject):
    prediction = predict(subject, "um", GPU, Options(device="cuda", device_budget_bytes=GIB // 4))
    assert prediction.host_peak_bytes <= subject.trace().saved_bytes


def test_what_readers_will_take_is_not_free_for_a_step():
    alone, beside = (
        free_profile(Options(readers_bytes=n_bytes)).device_bytes for n_bytes in (0, 2 * GIB)
    )
    assert alone - beside == pytest.approx(2 * GIB, abs=GIB // 2)


@pytest.mark.parametrize("strategy", ["auto", "stream", "vanilla"])
def test_readers_that_need_more_than_there_is_are_refused_under_any_strategy(subject, strategy):
    with pytest.raises(OutOfMemoryError, match=r"dataset\.workers \(now 1000\)"):
        check_run(subject, strategy, Options(), Readers(1000, GIB))


@pytest.mark.parametrize("strategy", ["um", "um_group", "um_group_prefetch"])
def test_managed_memory_that_has_room_is_on_the_gpu_as_vanillas_is(subject, strategy):
    paged, vanilla = (
        predict(subject, name, GPU, Options(device="cuda")) for name in (strategy, "vanilla")
    )
    assert paged.device_peak_bytes == pytest.approx(vanilla.device_peak_bytes, rel=0.01)
    assert paged.swapped_in_bytes == paged.swapped_out_bytes == 0


@pytest.mark.parametrize("strategy", ["vanilla", "checkpoint", "vdnn", "lms"])
def test_a_budget_on_the_processor_is_paid_for_in_page_faults(subject, strategy):
    cpu = load_profile("generic_cpu")
    slower = dataclasses.replace(cpu, first_touch_s_per_byte=cpu.first_touch_s_per_byte + 1e-9)
    budgeted = Options(device_budget_bytes=64 * GIB)
    fast, slow = (predict(subject, strategy, p, budgeted) for p in (cpu, slower))
    assert slow.step_s > fast.step_s
    fast, slow = (predict(subject, strategy, p, Options()) for p in (cpu, slower))
    assert slow.step_s == fast.step_s  # freed pages are used again


@pytest.mark.parametrize("strategy", ["um", "um_group", "um_group_prefetch"])
def test_pages_on_a_gpu_stay_within_the_budget(subject, strategy):
    options = Options(device="cuda", device_budget_bytes=GIB // 4)
    prediction = predict(subject, strategy, GPU, options)
    assert prediction.device_peak_bytes <= GIB // 4


@pytest.mark.parametrize("strategy", ["lms", "vdnn"])
def test_transfers_of_small_maps_cost_what_launching_them_takes(subject, strategy):
    small = Subject(subject.model, torch.empty(1, 3, 512, 512, device="meta"), "fp32")
    fast = dataclasses.replace(GPU, name="fast", launch_s=1e-9)
    slow = dataclasses.replace(GPU, name="slow", launch_s=1e-3)
    options = Options(device="cuda")
    there, vanilla = (predict(small, name, slow, options) for name in (strategy, "vanilla"))
    # Six maps of 8 MiB go out and come back, each for as much as a few kernels.
    assert 1e-3 < (there.step_s - vanilla.step_s) < 100e-3
    here, plain = (predict(small, name, fast, options) for name in (strategy, "vanilla"))
    assert here.compute_s == pytest.approx(plain.compute_s, rel=1e-3)


def test_on_a_gpu_only_what_multiplies_matrices_pays_for_cublas(subject):
    without = Subject(subject.model[0], subject.sample_batch, "fp32")
    assert process_bytes(subject.trace(), "cuda") > process_bytes(without.trace(), "cuda")


def test_without_a_gpu_each_convolution_has_kernels_of_its_own(subject):
    one = Subject(subject.model[0], subject.sample_batch, "fp32")
    assert process_bytes(subject.trace(), "cpu") > process_bytes(one.trace(), "cpu")


def test_without_a_page_pool_holes_are_planned_for_unless_a_budget_leaves_none(subject):
    pooled = load_profile("generic_cpu")
    heap = dataclasses.replace(pooled, has_page_pool=False)
    budget = Options(device_budget_bytes=8 * GIB)
    for name in ("vanilla", "checkpoint", "lms", "um"):
        held, with_holes = (predict(subject, name, p, Options()) for p in (pooled, heap))
        assert held.device_peak_bytes < with_holes.device_peak_bytes
        assert held.least_budget_bytes == with_holes.least_budget_bytes
        assert predict(subject, name, heap, budget) == predict(subject, name, pooled, budget)
    assert predict(subject, "stream", heap, Options()) == predict(
        subject, "stream", pooled, Options()
    )


def test_pages_leave_room_for_holes(subject):
    slide = Subject(subject.model, torch.empty(1, 3, 2048, 1024, device="meta"), "fp32")
    pooled = load_profile("generic_cpu")
    needed = predict(slide, "um_group_prefetch", pooled, Options()).device_peak_bytes
    for share in (0.65, 0.8, 0.95):
        tight = dataclasses.replace(pooled, device_bytes=int(share * needed), has_page_pool=False)
        prediction = predict(slide, "um_group_prefetch", tight, Options())
        assert prediction.swapped_in_bytes > 0
        assert prediction.fits, prediction.why


def test_strategies_that_keep_holes_small_are_planned_with_fewer(subject):
    pooled = load_profile("generic_cpu")
    heap = dataclasses.replace(pooled, has_page_pool=False)

    def growth(name):
        return (
            predict(subject, name, heap, Options()).device_peak_bytes
            / predict(subject, name, pooled, Options()).device_peak_bytes
        )

    assert 1.2 < growth("checkpoint") <= 1.4 < growth("vanilla") <= 1.9


def test_memory_that_only_a_pool_makes_enough_does_not_fit_without(subject):
    pooled = load_profile("generic_cpu")
    needed = predict(subject, "vanilla", pooled, Options()).device_peak_bytes
    tight = dataclasses.replace(pooled, device_bytes=int(1.3 * needed))
    heap = dataclasses.replace(tight, has_page_pool=False)
    assert predict(subject, "vanilla", tight, Options()).fits
    assert not predict(subject, "vanilla", heap, Options()).fits
