"""A budget that the kernel enforces: vanilla runs out of memory, the others train the same."""

import json
import os
import subprocess
import sys

import pytest

# Sixteen blocks that save 16 MiB each; the largest working set is some 30 MiB.
_PROGRAM = """
import json, sys
import torch
from copy import deepcopy
from torch import nn
from umtrain import memory
from umtrain.errors import OutOfMemoryError

torch.set_num_threads(1)
torch.manual_seed(0)
def block():
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
fresh = nn.Sequential(*(block() for _ in range(16)))
x = torch.randn(1, 8, 408, 408)

def run(name, budget):
    model = deepcopy(fresh)
    strategy = memory.create(name, device_budget=budget, spill_dir=sys.argv[1])
    try:
        strategy.prepare(model, x)
        with strategy.step():
            loss = model(x).square().mean()
            loss.backward()
        gradients = [p.grad.double().sum().item() for p in model.parameters()]
        return ["ok", loss.item(), gradients, strategy.stats().device_peak_bytes]
    except OutOfMemoryError as error:
        return ["oom", str(error)]
    finally:
        strategy.close()

others = ("vdnn", "lms", "um", "um_group", "um_group_prefetch", "checkpoint")
outcomes = {name: run(name, "140MiB") for name in ("vanilla", *others)}
outcomes["all of it"] = run("vanilla", None)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return how each strategy ended, in a process of their own."""
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path_factory.mktemp("spill"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_vanilla_runs_out_of_memory(outcomes):
    status, text = outcomes["vanilla"]
    assert status == "oom"
    assert "memory.device_budget: 140.00 MiB" in text


@pytest.mark.parametrize(
    "strategy", ["vdnn", "lms", "um", "um_group", "um_group_prefetch", "checkpoint"]
)
def test_the_others_train_as_vanilla_does_with_all_memory(strategy, outcomes):
    status, loss, gradients, _ = outcomes[strategy]
    assert status == "ok"
    assert (loss, gradients) == tuple(outcomes["all of it"][1:3])


def test_vanilla_with_all_memory_takes_more_than_the_budget(outcomes):
    assert outcomes["all of it"][3] > 220 * 2**20


# A heap with 512 MiB free in pieces of 8 MiB, each kept from its neighbours.
_USED_HEAP_PROGRAM = """
import torch
from torch import nn
from umtrain import memory
from umtrain.errors import OutOfMemoryError
from umtrain.memory import linux
from umtrain.memory.allocator import recycle_large_buffers

torch.set_num_threads(1)
recycle_large_buffers("cpu")
pairs = [(torch.ones(2**21), torch.ones(2**14)) for _ in range(64)]
between = [small for _, small in pairs]
del pairs
mapped_bytes = linux.data_bytes()
# Of 7.5 MiB each: what the heap has free would do.
model = nn.Sequential(*(nn.Tanh() for _ in range(40)))
x = torch.randn(1, 8, 480, 512, requires_grad=True)
strategy = memory.create("vanilla", device_budget="1GiB")
strategy.prepare(model, x)
strategy.close()
pieces = [torch.ones(2**20) for _ in range(60)]
print("again" if linux.data_bytes() < mapped_bytes + 2**26 else "lost")
del pieces
strategy = memory.create("vanilla", device_budget="128MiB")
strategy.prepare(model, x)
try:
    with strategy.step():
        model(x).sum().backward()
    print("ok")
except OutOfMemoryError:
    print("oom")
strategy.close()
"""


@pytest.fixture(scope="module")
def used_heap(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("no-pool")
    command = [sys.executable, "-c", _USED_HEAP_PROGRAM]
    without_pool = {"CXX": str(tmp_path / "no-compiler"), "UMTRAIN_CACHE": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | without_pool
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_what_a_used_heap_has_free_is_no_part_of_the_budget(used_heap):
    assert used_heap[1] == "oom"


def test_the_heap_has_it_again_when_the_budget_is_lifted(used_heap):
    assert used_heap[0] == "again"
