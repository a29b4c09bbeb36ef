"""Vanilla: ordinary training, with a budget that the kernel enforces."""

import resource

import pytest
import torch
from torch import nn

from umtrain import memory
from umtrain.errors import ConfigError, DeviceError, OutOfMemoryError

MIB = 2**20


@pytest.fixture
def hungry():
    """Return a model that needs 256 MiB in its forward pass."""
    return nn.Sequential(nn.Conv2d(1, 64, 1), nn.Sigmoid())


def test_the_heap_runs_out_at_the_budget(hungry):
    strategy = memory.create("vanilla", device_budget="128MiB")
    # 1 GiB a map: more than what earlier tests may have left free in this process's heap.
    x = torch.randn(1, 1, 2048, 2048)
    strategy.prepare(hungry, x)
    try:
        with (
            pytest.raises(OutOfMemoryError, match=r"memory=vanilla \(memory.device_budget: 128"),
            strategy.step(),
        ):
            hungry(x)
    finally:
        strategy.close()


def test_the_message_names_strategies_that_need_less(hungry):
    text = memory.create("vanilla")._out_of_memory_text()
    assert "memory=stream|um_group_prefetch|um_group|um|lms|vdnn|checkpoint needs less" in text


def test_the_model_trains_on_after_memory_ran_out(hungry):
    strategy = memory.create("vanilla", device_budget="128MiB")
    strategy.prepare(hungry, torch.randn(1, 1, 64, 64))
    try:
        with pytest.raises(OutOfMemoryError), strategy.step():
            hungry(torch.randn(1, 1, 1024, 1024))
        with strategy.step():
            hungry(torch.randn(1, 1, 64, 64)).sum().backward()
    finally:
        strategy.close()
    assert hungry[0].weight.grad is not None


def test_closing_lifts_the_limit(hungry):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    strategy = memory.create("vanilla", device_budget="128MiB")
    strategy.prepare(hungry, torch.randn(1, 1, 8, 8))
    assert resource.getrlimit(resource.RLIMIT_DATA) != before
    strategy.close()
    strategy.close()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_errors_that_are_not_of_memory_pass_through(hungry):
    strategy = memory.create("vanilla")
    strategy.prepare(hungry, torch.randn(1, 1, 8, 8))
    with pytest.raises(RuntimeError, match="expected input"), strategy.step():
        hungry(torch.randn(1, 3, 8, 8))


def test_peaks_are_of_the_device_over_what_the_process_held(hungry):
    strategy = memory.create("vanilla")
    x = torch.randn(1, 1, 1024, 1024)
    strategy.prepare(hungry, x)
    before = strategy.stats()
    assert before.device_peak_bytes is None
    assert before.reasons["device_peak_bytes"] == "no step has finished yet"
    with strategy.step():
        hungry(x)
    stats = strategy.stats()
    assert 256 * MIB <= stats.device_peak_bytes <= 900 * MIB
    assert stats.rss_peak_bytes > stats.device_peak_bytes
    assert (stats.swapped_out_bytes, stats.host_peak_bytes) == (0, 0)


def test_an_unknown_strategy_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="memory=magic is no memory strategy; choose one of "):
        memory.create("magic")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device_budget": "lots"}, "memory.device_budget=lots is not a size"),
        (
            {"grouping": "random"},
            "memory.grouping=random is not known; choose one of blocks, equal",
        ),
        ({"prefetch_depth": 0}, "memory.prefetch_depth=0 must be at least 1 group"),
        ({"policy": "fc"}, "memory.policy=fc is not known; choose one of all, conv"),
        ({"device": "tpu"}, "device=tpu is not known"),
        ({"oversubscribe": True}, "memory.oversubscribe=true is about a GPU's managed memory"),
        ({"speed": "high"}, "memory has no option speed; its options are"),
    ],
)
def test_a_wrong_option_is_named(options, text):
    with pytest.raises(ConfigError, match=text):
        memory.create("um", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(DeviceError, match="device=cuda: torch finds no GPU here"):
        memory.create("um", device="cuda")


def test_placement_is_refused_without_a_gpu():
    with pytest.raises(DeviceError, match="memory=placement divides a model between a GPU and"):
        memory.create("placement", cpu_layers=["layer1"])
