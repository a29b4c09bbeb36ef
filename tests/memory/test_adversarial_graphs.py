"""Graphs that break naive saved-tensor tricks; every strategy does what vanilla does."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from umtrain import memory
from umtrain.errors import ConfigError

HOOKED = ("vdnn", "lms", "um", "um_group", "um_group_prefetch")
STRATEGIES = (*HOOKED, "checkpoint")
SHAPE = (2, 8, 48, 48)


@pytest.fixture(autouse=True)
def _everything_moves(room):
    room(0)


class Views(nn.Module):
    """Saves slices, transposes and expansions of one storage."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        left, right = y.chunk(2, dim=1)
        wide = right.mean(dim=1, keepdim=True).expand_as(left)
        return (left * right).transpose(1, 3) * (left * wide).transpose(1, 3)


class InPlace(nn.Module):
    """Changes tensors in place before anything needs the old value."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y += x
        y = self.relu(y)
        return self.conv(y).mul_(2.0)


class SavedTwice(nn.Module):
    """Saves one tensor in four operations, under two shapes."""

    def forward(self, x):
        y = self.conv(x)
        return (y * y).sum(1) + y.flatten(2).square().unflatten(2, y.shape[2:]).exp().mean(1)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)


class LateResidual(nn.Module):
    """Reads the first map again at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4))
        )

    def forward(self, x):
        early = self.blocks[0](x)
        y = early
        for block in self.blocks[1:]:
            y = block(y)
        return torch.cat([y, early], dim=1) * torch.cat([early, y], dim=1)


class Dropouts(nn.Module):
    """Needs the same random numbers wherever it runs."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.4))
        self.blocks = nn.Sequential(block, nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout2d(0.5)))

    def forward(self, x):
        return self.blocks(x)


class SharedLayer(nn.Module):
    """Calls one block three times: its running statistics move three times."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())

    def forward(self, x):
        return self.block(self.block(self.block(x)))


class ShortLived(nn.Module):
    """Frees maps of one size again and again, so that addresses are used again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))

    def forward(self, x):
        total = x
        for power in range(1, 9):
            total = total + torch.sin(x * self.scale * power) * torch.cos(x * self.scale / power)
        return total


class _GivesSavedBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(gradient)
        return (x * gradient).sum()

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient, None


class SavedAsGradient(nn.Module):
    """Its backward returns a saved tensor itself, which then lives on as a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 8, 48, 48))

    def forward(self, x):
        return _GivesSavedBack.apply(self.weight, x.exp())


class Doubles(nn.Module):
    """Mixes float64, integers and complex numbers with float32."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 48, dtype=torch.float64))

    def forward(self, x):
        y = x.double() @ self.weight
        spectrum = torch.fft.fft2(y)
        return (spectrum * spectrum.conj()).real + y.gather(3, y.argsort(dim=3))


GRAPHS = (
    Views,
    InPlace,
    SavedTwice,
    LateResidual,
    Dropouts,
    SharedLayer,
    ShortLived,
    SavedAsGradient,
    Doubles,
)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_as_vanilla(strategy, graph, train, room):
    def build():
        torch.manual_seed(1)
        return graph()

    expected = train("vanilla", build, SHAPE, n_steps=3)
    room(200 * 1024)
    train(strategy, build, SHAPE, n_steps=3).assert_same_bits(expected)


@pytest.fixture
def attached():
    """Return a function that attaches a strategy to a model and closes it after the test."""
    strategies = []

    def attach(name, model, **options):
        strategy = memory.create(name, **options)
        strategies.append(strategy)
        strategy.prepare(model, torch.randn(SHAPE))
        return strategy

    yield attach
    for strategy in strategies:
        strategy.close()


@pytest.mark.parametrize("strategy", HOOKED)
def test_differentiating_twice_is_refused(strategy, attached):
    model = LateResidual()
    x = torch.randn(SHAPE, requires_grad=True)
    with (
        pytest.raises(ConfigError, match=f"memory={strategy} cannot differentiate twice"),
        attached(strategy, model).step(),
    ):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("strategy", ["checkpoint", "um", "um_group", "um_group_prefetch"])
def test_what_moves_nothing_differentiates_twice(strategy, attached, room):
    room(2**40)
    model = LateResidual()
    x = torch.randn(SHAPE, requires_grad=True)

    def second_gradient():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = second_gradient()
    with attached(strategy, model).step():
        assert torch.equal(second_gradient(), expected)


class ChangedAfterwards(nn.Module):
    """Changes in place what exp saved: backward has to fail."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept = []

    def forward(self, x):
        y = (x * self.weight).exp()
        z = y.sum()
        self.kept = [y]
        y.add_(1.0)
        return z + y.sum()


@pytest.mark.parametrize("strategy", ["vanilla", *HOOKED])
def test_a_saved_tensor_that_was_changed_makes_backward_fail(strategy, attached):
    model = ChangedAfterwards()
    under = attached(strategy, model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), under.step():
        model(torch.randn(SHAPE)).backward()


class FailsOnce(nn.Module):
    """Raises in the middle of its first forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = LateResidual()
        self.fails = False

    def forward(self, x):
        y = self.inner.blocks[0](x)
        if self.fails:
            raise ValueError("mid-forward")
        return self.inner(x) * y.mean()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_that_failed_trains_on(strategy, attached):
    model, x = FailsOnce(), torch.randn(SHAPE)
    under = attached(strategy, model)
    model.fails = True
    with pytest.raises(ValueError, match="mid-forward"), under.step():
        model(x)
    model.fails = False
    with under.step():
        model(x).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    under.close()
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_twice_through_a_retained_graph(strategy, attached):
    model, x = LateResidual(), torch.randn(SHAPE)
    with attached(strategy, model).step():
        loss = model(x).sum()
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gc.collect()
        second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_accumulate_over_passes_of_one_step(strategy, attached):
    model = LateResidual()
    batches = [torch.randn(SHAPE), torch.randn(SHAPE)]
    for x in batches:
        model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with attached(strategy, model).step():
        for x in batches:
            model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_functional_operations_need_no_layer(strategy, attached):
    weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    model = nn.Module()
    model.weight = weight
    model.forward = lambda x: F.gelu(F.conv2d(x, weight, padding=1)).square()
    x = torch.randn(SHAPE)
    model(x).sum().backward()
    expected, weight.grad = weight.grad, None
    with attached(strategy, model).step():
        model(x).sum().backward()
    assert torch.equal(weight.grad, expected)
