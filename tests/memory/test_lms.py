"""Large model support and vDNN: explicit copies out and in, and who waits for them."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from umtrain import memory
from umtrain.memory.meters import CpuMeter
from umtrain.memory.saved import SavedTensors
from umtrain.memory.swap import Swapper
from umtrain.memory.swap_pinned import PinnedChannel
from umtrain.memory.trace import Trace

MAP = (1, 8, 64, 64)
MAP_BYTES = 8 * 64 * 64 * 4


@pytest.fixture
def chain():
    """Return six convolutions in a row: each saves its input."""
    return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)))


def _run(name, model, **options):
    strategy = memory.create(name, **options)
    x = torch.randn(MAP)
    strategy.prepare(model, x)
    with strategy.step():
        model(x).sum().backward()
    strategy.close()
    return strategy.stats(), strategy.trace.spans()


def test_every_saved_tensor_goes_out_and_comes_back_once(chain):
    stats, spans = _run("lms", chain)
    assert stats.swapped_out_bytes == 6 * MAP_BYTES
    out = [span for span in spans if span.lane == "swap-out"]
    assert sum(span.n_bytes for span in out) == 6 * MAP_BYTES
    assert stats.swapped_in_bytes <= 6 * MAP_BYTES
    assert stats.host_peak_bytes == 6 * MAP_BYTES


def test_vdnn_waits_for_each_layer(chain):
    _, spans = _run("vdnn", chain)
    out = [span for span in spans if span.lane == "swap-out"]
    assert len(out) == 6
    forward_end_s = max(span.end_s for span in spans if span.lane == "forward")
    assert max(span.end_s for span in out) <= forward_end_s


def test_vdnn_conv_leaves_the_inputs_of_other_layers_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Tanh())
    of_convs, _ = _run("vdnn", model, policy="conv")
    of_all, _ = _run("vdnn", model, policy="all")
    assert of_convs.swapped_out_bytes == MAP_BYTES
    assert of_all.swapped_out_bytes == 3 * MAP_BYTES


def test_vdnn_conv_frees_an_input_that_another_layer_had_saved_first():
    model = nn.Sequential(nn.Tanh(), nn.Conv2d(8, 8, 1, bias=False))
    freed = []
    model[0].register_forward_hook(
        lambda m, a, output: freed.append(output.untyped_storage()._weak_ref())
    )
    strategy = memory.create("vdnn", policy="conv")
    x = torch.randn(MAP)
    strategy.prepare(model, x)
    with strategy.step():
        loss = model(x).sum()
        assert torch.UntypedStorage._expired(freed[0])
        loss.backward()
    strategy.close()


# Maps of 64 MiB. Freed ones make holes that the next do not fit; without a limit the heap holds
# twenty of them after a few steps.
_HOLES_PROGRAM = """
import torch
from torch import nn
from umtrain import memory
from umtrain.memory.allocator import recycle_large_buffers

recycle_large_buffers("cpu")
model = nn.Sequential(*(nn.Tanh() for _ in range(6)))
x = torch.randn(1, 16, 1024, 1024, requires_grad=True)
strategy = memory.create("lms")
strategy.prepare(model, x)
for _ in range(6):
    with strategy.step():
        model(x).sum().backward()
print(strategy.stats().device_peak_bytes, x.nbytes)
strategy.close()
"""


def test_holes_in_the_heap_do_not_eat_what_swapping_saves(tmp_path):
    command = [sys.executable, "-c", _HOLES_PROGRAM]
    without_pool = {"CXX": str(tmp_path / "no-compiler"), "UMTRAIN_CACHE": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | without_pool
    )
    assert done.returncode == 0, done.stderr
    peak_bytes, map_bytes = map(int, done.stdout.split())
    assert peak_bytes < 13 * map_bytes


@pytest.fixture
def swap_on_gpu(driver, chain, request):
    """Return a function that runs a step of `chain` with copies to pinned memory, recorded."""

    def run(window_maps, limit_bytes=None):
        from umtrain.memory.group_tracker import GroupTracker
        from umtrain.memory.grouping import Group

        meter, trace = CpuMeter(), Trace()
        channel = PinnedChannel(driver, "cpu", limit_bytes)
        swapper = Swapper(channel, window_maps * MAP_BYTES, meter, trace)
        tracker = GroupTracker(chain, [Group("all", ())], trace)
        saved = SavedTensors("lms", chain, swapper, tracker, smallest_bytes=1024)
        x = torch.randn(MAP)
        for _ in range(2):
            chain.zero_grad()
            swapper.start_step()
            with saved.hooks():
                chain(x).sum().backward()
        gradients = [p.grad for p in chain.parameters()]
        chain.zero_grad()
        chain(x).sum().backward()
        assert all(
            torch.equal(p.grad, g) for p, g in zip(chain.parameters(), gradients, strict=True)
        )
        return meter

    return run


def test_copies_out_wait_for_the_compute_that_made_their_source(swap_on_gpu, driver):
    swap_on_gpu(window_maps=2)
    for index, call in enumerate(driver.calls):
        if call[0] == "copy" and call[2] == "out":
            made, waited = driver.calls[index - 2 : index]
            assert made[:2] == ("record", "compute")
            assert waited == ("wait", "out", made[2])


def test_the_reader_of_a_copy_in_waits_for_it(swap_on_gpu, driver):
    swap_on_gpu(window_maps=2)
    arrivals = [call[2] for call in driver.named("record") if call[1] == "in"]
    waited = [call[2] for call in driver.named("wait") if call[1] == "compute"]
    assert arrivals
    assert set(arrivals) <= set(waited)


def test_sources_are_freed_only_after_compute_waits_for_their_copy(swap_on_gpu, driver):
    swap_on_gpu(window_maps=0)
    copies_out = [call[2] for call in driver.named("record") if call[1] == "out"]
    waited = {call[2] for call in driver.named("wait") if call[1] == "compute"}
    assert set(copies_out) <= waited


def test_copies_in_run_a_window_ahead_in_reverse_order(swap_on_gpu, driver):
    swap_on_gpu(window_maps=2)
    first_in = next(i for i, c in enumerate(driver.calls) if c[0] == "copy" and c[2] == "in")
    first_read = next(
        i for i, c in enumerate(driver.calls) if i > first_in and c[:2] == ("wait", "compute")
    )
    copies = [c for c in driver.calls[: first_read + 30] if c[0] == "copy" and c[2] == "in"]
    assert len(copies) >= 3


def test_pinned_buffers_are_used_again_in_the_next_step(swap_on_gpu, driver):
    swap_on_gpu(window_maps=2)
    assert len(driver.named("allocate_pinned")) == 6
    assert len([c for c in driver.named("copy") if c[2] == "out"]) == 12


def test_pinned_memory_stops_at_the_host_budget(swap_on_gpu):
    from umtrain.errors import OutOfMemoryError

    with pytest.raises(OutOfMemoryError, match=r"pinned memory are needed and memory.host_budget"):
        swap_on_gpu(window_maps=2, limit_bytes=3 * MAP_BYTES)
