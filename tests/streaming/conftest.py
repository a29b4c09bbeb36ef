"""A network under the engine against the same network under plain autograd."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from ram_host import RamHost
from torch import Tensor, nn

from umtrain import models
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings

EXACT = 1e-11


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Both:
    """What a step gave under autograd (`plain`) and under the engine (`streamed`)."""

    names: list[str]
    plain: list[Tensor | None]
    streamed: list[Tensor | None]

    def assert_equal(self, tolerance: float = EXACT) -> None:
        # A gradient that is zero but for rounding (a bias before a norm) is judged by the others.
        least = max(1e-4, *(1e-4 * a.abs().max() for a in self.plain if a is not None))
        for name, a, b in zip(self.names, self.plain, self.streamed, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                scale = a.abs().max().clamp(min=least)
                assert ((a - b).abs().max() / scale).item() <= tolerance, name


def liven(model: nn.Module) -> nn.Module:
    """Give norms scales and shifts that differ, so that none of their gradients vanishes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
            and module.weight is not None
        ):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return model


def squares(output: Tensor) -> Tensor:
    """Return a loss that tells every output apart."""
    weights = torch.linspace(0.5, 1.5, output.numel()).to(output).view_as(output)
    return (output * weights).square().sum()


@pytest.fixture
def compare() -> Callable[..., Both]:
    """Return a function that runs one step both ways and returns what each left behind."""

    def run(
        model: nn.Module,
        x: Tensor,
        *,
        strip_bytes: int = 4096,
        budget_bytes: int | None = None,
        host: RamHost | None = None,
        loss: Callable[[Tensor], Tensor] = squares,
        steps: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> Both:
        is_volume = x.ndim == 5
        layout = torch.channels_last_3d if is_volume else torch.channels_last
        model = liven(model.to(dtype)).to(memory_format=layout)
        other = copy.deepcopy(model)
        streamer = Streamer(other, Settings(lambda: budget_bytes, host, strip_bytes))
        found = []
        for network, forward in ((model, model), (other, streamer)):
            given = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
            given.grad = None
            torch.manual_seed(3)
            for _ in range(steps):
                value = loss(forward(given))
                value.backward()
            parameters = [p.grad for p in network.parameters()]
            buffers = [b.detach().to(torch.float64) for b in network.buffers()]
            found.append([value.detach(), given.grad.clone(), *parameters, *buffers])
        names = ["loss", "input"]
        names += [name for name, _ in model.named_parameters()]
        names += [name for name, _ in model.named_buffers()]
        return Both(names, found[0], found[1])

    return run


@pytest.fixture
def host() -> RamHost:
    return RamHost()


@pytest.fixture
def errors_against_float64() -> Callable[[torch.dtype], tuple[float, float]]:
    """Return a function: the relative error of all gradients of a step in some precision, under
    autograd and under the engine."""
    return _errors_against_float64


def _errors_against_float64(precision: torch.dtype) -> tuple[float, float]:
    torch.manual_seed(0)
    model = models.create("resnet50", in_channels=3, n_outputs=2)
    model = liven(model).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 193, 193).to(precision).float()
    exact = _gradients(copy.deepcopy(model).double(), x.double(), torch.float64, False)
    errors = []
    for is_streamed in (False, True):
        network = copy.deepcopy(model)
        found = _gradients(network, x, precision, is_streamed)
        errors.append(((found - exact).norm() / exact.norm()).item())
    return errors[0], errors[1]


def _gradients(network: nn.Module, x: Tensor, precision: torch.dtype, is_streamed: bool) -> Tensor:
    forward = Streamer(network, Settings(strip_bytes=100_000)) if is_streamed else network
    given = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = forward(given)
    output.double().square().sum().backward()
    return torch.cat([p.grad.double().flatten() for p in network.parameters()])
