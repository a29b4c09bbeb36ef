"""Checkpointing: what runs twice, and what must not show it."""

import pytest
import torch
from torch import nn

from umtrain import memory


class Block(nn.Module):
    """Counts its runs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.n_runs = 0

    def forward(self, x):
        self.n_runs += 1
        return torch.relu(self.norm(self.conv(x)))


@pytest.fixture
def stack():
    return nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Conv2d(8, 2, 1))


X = torch.randn(1, 8, 32, 32)


def _step(strategy, model):
    with strategy.step():
        model(X).sum().backward()


def test_blocks_run_twice_and_statistics_move_once(stack):
    strategy = memory.create("checkpoint")
    strategy.prepare(stack, X)
    before = [block.n_runs for block in stack[0]]
    _step(strategy, stack)
    strategy.close()
    runs = [block.n_runs - n for block, n in zip(stack[0], before, strict=True)]
    assert runs == [2, 2, 2, 2]
    assert [int(block.norm.num_batches_tracked) for block in stack[0]] == [1, 1, 1, 1]


def test_blocks_keep_their_input_only(stack):
    kept_bytes = {}
    for name in ("vanilla", "checkpoint"):
        saved = {}
        strategy = memory.create(name)
        strategy.prepare(stack, X)

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(X)
        strategy.close()
        kept_bytes[name] = sum(tensor.nbytes for tensor in saved.values() if tensor.dim() == 4)
    assert kept_bytes["checkpoint"] < 0.6 * kept_bytes["vanilla"]


@pytest.mark.parametrize(("limit", "n_inputs"), [("1GiB", 1), ("1KiB", 4)])
def test_equal_grouping_unites_blocks_up_to_the_working_set(stack, limit, n_inputs, monkeypatch):
    runs = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*arguments, **keywords):
        runs.append(arguments[0])
        return real(*arguments, **keywords)

    monkeypatch.setattr("umtrain.memory.checkpoint.checkpoint", counted)
    strategy = memory.create("checkpoint", grouping="equal", group_bytes=limit)
    strategy.prepare(stack, X)
    _step(strategy, stack)
    strategy.close()
    assert len(runs) == n_inputs


def test_nothing_runs_twice_without_gradients(stack):
    strategy = memory.create("checkpoint")
    strategy.prepare(stack, X)
    before = [block.n_runs for block in stack[0]]
    with torch.no_grad():
        stack(X)
    strategy.close()
    assert [block.n_runs - n for block, n in zip(stack[0], before, strict=True)] == [1, 1, 1, 1]


def test_closing_gives_the_model_its_own_forward_back(stack):
    strategy = memory.create("checkpoint")
    strategy.prepare(stack, X)
    strategy.close()
    before = [block.n_runs for block in stack[0]]
    stack(X).sum().backward()
    assert [block.n_runs - n for block, n in zip(stack[0], before, strict=True)] == [1, 1, 1, 1]
    assert all("forward" not in vars(module) for module in stack.modules())
