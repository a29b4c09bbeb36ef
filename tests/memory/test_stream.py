"""memory=stream in a training loop: exact, within its budget, with a real spill file."""

import json
import subprocess
import sys
from copy import deepcopy

import pytest
import torch

from umtrain import memory, models
from umtrain.errors import DeviceError, OutOfMemoryError
from umtrain.memory.stream import Stream


@pytest.fixture
def spills(monkeypatch, room):
    """Let a strategy believe that feature maps have next to no room, and nothing else needs any."""
    monkeypatch.setattr(Stream, "_other_bytes", lambda self: 0)
    room(2**20)


def test_steps_are_vanilla_s_when_maps_go_through_the_spill_file(spills, train, tmp_path):
    torch.manual_seed(0)
    fresh = models.create("resunet35", in_channels=1, n_outputs=2).double()
    shape = (2, 1, 128, 128)
    outcomes = [
        train(name, lambda: deepcopy(fresh), shape, n_steps=3, dtype=torch.float64, **options)
        for name, options in (("vanilla", {}), ("stream", {"spill_dir": tmp_path}))
    ]
    pairs = zip(outcomes[0].gradients, outcomes[1].gradients, strict=True)
    for plain, streamed in pairs:
        scale = plain.abs().max().clamp(min=1e-9)
        assert ((plain - streamed).abs().max() / scale).item() < 1e-9
    for plain, streamed in zip(outcomes[0].losses, outcomes[1].losses, strict=True):
        torch.testing.assert_close(plain, streamed, rtol=1e-11, atol=0)


def test_what_moves_is_counted_and_nothing_is_left_behind(spills, tmp_path):
    model = models.create("resunet35", in_channels=1, n_outputs=2)
    x = torch.randn(1, 1, 192, 192)
    strategy = memory.create("stream", spill_dir=tmp_path)
    strategy.prepare(model, x)
    with strategy.step():
        model(x).square().mean().backward()
    stats = strategy.stats()
    assert stats.swapped_out_bytes > 2**20
    assert stats.swapped_in_bytes >= stats.swapped_out_bytes
    assert stats.host_peak_bytes > 2**20
    strategy.close()
    assert list(tmp_path.iterdir()) == []
    assert "forward" not in vars(model)


def test_a_spill_folder_without_room_is_refused_before_training(spills, tmp_path):
    model = models.create("resunet35", in_channels=1, n_outputs=2)
    strategy = memory.create("stream", spill_dir=tmp_path / "missing")
    with pytest.raises(DeviceError, match="spill_dir"):
        strategy.prepare(model, torch.randn(1, 1, 192, 192))
    strategy.close()


def test_a_host_budget_that_is_too_small_is_named(spills, tmp_path):
    model = models.create("resunet35", in_channels=1, n_outputs=2)
    strategy = memory.create("stream", spill_dir=tmp_path, host_budget="1MiB")
    with pytest.raises(OutOfMemoryError, match="host_budget"):
        strategy.prepare(model, torch.randn(1, 1, 192, 192))
    strategy.close()


def test_a_budget_below_what_is_possible_names_the_least(tmp_path):
    model = models.create("resunet35", in_channels=1, n_outputs=2)
    strategy = memory.create("stream", spill_dir=tmp_path, device_budget="64MiB")
    with pytest.raises(OutOfMemoryError, match="the least that works here is"):
        strategy.prepare(model, torch.randn(1, 1, 192, 192))
    strategy.close()


def test_evaluation_streams_too(tmp_path):
    torch.manual_seed(0)
    model = models.create("resunet35", in_channels=1, n_outputs=2).eval()
    x = torch.randn(1, 1, 128, 64)
    expected = model(x)
    strategy = memory.create("stream", spill_dir=tmp_path)
    prepared = strategy.prepare_inference(model, x)
    with torch.inference_mode():
        output = prepared(x)
    strategy.close()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


_TIGHT = """
import json, sys, torch
from umtrain import memory, models
from umtrain.errors import OutOfMemoryError
torch.set_num_threads(1)
x = torch.randn(1, 1, 640, 640)
def run(name):
    torch.manual_seed(0)
    model = models.create("resunet35", in_channels=1, n_outputs=2)
    strategy = memory.create(name, device_budget="300MiB", spill_dir=sys.argv[1])
    try:
        strategy.prepare(model, x)
        with strategy.step():
            loss = model(x).square().mean()
            loss.backward()
        return ["ok", loss.item(), strategy.stats().device_peak_bytes]
    except OutOfMemoryError as error:
        return ["oom", str(error)]
    finally:
        strategy.close()
print(json.dumps({name: run(name) for name in ("vanilla", "stream")}))
"""


def test_a_budget_that_the_kernel_enforces_stops_vanilla_and_not_streaming(tmp_path):
    command = [sys.executable, "-c", _TIGHT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["vanilla"][0] == "oom"
    assert "stream" in outcomes["vanilla"][1]
    assert outcomes["stream"][0] == "ok"
    assert outcomes["stream"][2] <= 300 * 2**20


# Images of 150 MB, and as many bytes of parameters, whose states come between two of them.
_LEAST = """
import re, sys, torch
from torch import nn
from umtrain import memory
from umtrain.errors import OutOfMemoryError
from umtrain.memory.allocator import giving_back, recycle_large_buffers

recycle_large_buffers("cpu")
torch.set_num_threads(1)
layout = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}

def block(n_in, n_out):
    return [nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU()]

def train(budget):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4096), nn.Linear(4096, 4096)]
    model = nn.Sequential(*block(3, 8), *block(8, 16), *head)
    model = model.to(memory_format=torch.channels_last)
    with giving_back():
        sample = torch.empty(1, 3, 5056, 5056, **layout)
    strategy = memory.create("stream", device_budget=budget, spill_dir=sys.argv[1])
    try:
        with torch.autocast("cpu", torch.bfloat16):
            strategy.prepare(model, sample)
        del sample
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for n in range(4):
            with strategy.step(), torch.autocast("cpu", torch.bfloat16):
                if n == 3:
                    model.eval().requires_grad_(False)
                loss = model(torch.empty(1, 3, 5056, 5056, **layout).fill_(1)).float().sum()
                if n < 3:
                    loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    finally:
        strategy.close()

try:
    train("200MiB")
except OutOfMemoryError as error:
    least = re.search("the least that works here is (.*?iB)", str(error))[1]
train(least.replace(" ", ""))
print(least)
"""


def test_the_least_budget_that_is_named_is_enough_for_steps_and_evaluation(tmp_path):
    command = [sys.executable, "-c", _LEAST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MiB" in done.stdout


def test_closing_gives_the_arena_back_to_the_system():
    code = """
import psutil, torch
from torchvision.models import resnet18
from umtrain import memory
from umtrain.memory.allocator import recycle_large_buffers

recycle_large_buffers("cpu")
model, x = resnet18(), torch.randn(1, 3, 512, 512)
strategy = memory.create("stream")
strategy.prepare(model, x)
with strategy.step():
    model(x).square().mean().backward()
held = psutil.Process().memory_info().rss
strategy.close()
print(held - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20
