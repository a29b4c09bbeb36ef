"""Normalisations: their statistics from strips, and the gradient that flows through them.

A normalisation of a map y is z = scale·y + shift per channel (and image), where scale = γ·invstd
and shift = β - mean·scale. Its statistics come from the strips of y, joined by the parallel
formula of Chan, Golub & LeVeque (1979). In backward every reader of z adds up Σg and Σg·(y-mean);
from these follow the gradients of γ and β, and of the statistics:

    dmean = -γ·invstd·Σg        dvar = -½·γ·invstd³·Σg·(y-mean)

(summed over what shares the statistics), which act on y as a + b·y, see README.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from umtrain.exchange import Exchange, join_moments
from umtrain.streaming.program import Norm


class Moments:
    """Count, mean and sum of squared deviations per image and channel, joined strip by strip."""

    def __init__(self, n_images: int, channels: int, device: torch.device) -> None:
        self.counts = [0] * n_images
        self.mean = torch.zeros(n_images, channels, dtype=torch.float64, device=device)
        self.square = torch.zeros_like(self.mean)

    def add(self, image: int, count: int, shift: Tensor, sums: tuple[Tensor, Tensor]) -> None:
        """Join `count` pixels with the sums of y - shift and of its square, (C,)."""
        offset = sums[0] / count
        mean = shift.double() + offset
        square = (sums[1] - sums[0] * offset).clamp_(min=0)
        before = self.counts[image]
        total = before + count
        delta = mean - self.mean[image]
        self.mean[image] += delta * (count / total)
        self.square[image] += square + delta.square() * (before * count / total)
        self.counts[image] = total


@dataclass
class Statistics:
    """Mean, variance and inverse deviation of a normalisation, float64 (N or 1, C)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor
    n: float | Tensor | None  # values behind each; None: they were given


def statistics_of(
    norm: Norm, moments: Moments | None, exchange: Exchange | None = None
) -> Statistics:
    """Return the statistics over the norm's domain; updates running ones where it has them.

    With an `exchange` the domain is spread over all ranks, of which each gives its `moments`.
    """
    if norm.domain == "fixed":
        running_mean, running_var = norm.module.running_mean, norm.module.running_var
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        return _statistics(norm, running_mean.double()[None], running_var.double()[None], None)
    assert moments is not None
    mean, square, count = _joined(norm, moments)
    var = square / count
    n: float | Tensor = float(count)
    others: float | Tensor = float(max(1, count - 1))
    if exchange is not None:
        mean, var, n = join_moments(exchange, mean, square, count)
        others = (n - 1).clamp(min=1)
    if norm.is_updating:
        _update_running(norm.module, mean[0], var[0] * (n / others))
    return _statistics(norm, mean, var, n)


def _statistics(norm: Norm, mean: Tensor, var: Tensor, n: float | Tensor | None) -> Statistics:
    return Statistics(mean, var, (var + norm.eps).rsqrt(), n)


def _joined(norm: Norm, moments: Moments) -> tuple[Tensor, Tensor, int]:
    mean, square, count = moments.mean, moments.square, moments.counts[0]
    if norm.domain == "image":
        return mean, square, count
    if norm.domain == "batch":
        joint = mean.mean(0, keepdim=True)
        spread = square.sum(0, keepdim=True) + count * (mean - joint).square().sum(0, keepdim=True)
        return joint, spread, count * len(mean)
    n_images, channels = mean.shape
    grouped = mean.view(n_images, norm.groups, -1)
    joint = grouped.mean(2, keepdim=True)
    spread = square.view_as(grouped).sum(2, keepdim=True)
    spread = spread + count * (grouped - joint).square().sum(2, keepdim=True)
    shape = (n_images, channels)
    n = count * grouped.shape[2]
    return joint.expand_as(grouped).reshape(shape), spread.expand_as(grouped).reshape(shape), n


def _update_running(module: torch.nn.Module, mean: Tensor, unbiased_var: Tensor) -> None:
    running_mean, running_var = module.running_mean, module.running_var
    if not isinstance(running_mean, Tensor) or not isinstance(running_var, Tensor):
        return
    counter = module.num_batches_tracked
    momentum = module.momentum
    if isinstance(counter, Tensor):
        counter += 1
        momentum = 1 / int(counter) if momentum is None else momentum
    assert isinstance(momentum, float)
    running_mean.mul_(1 - momentum).add_(mean.to(running_mean), alpha=momentum)
    running_var.mul_(1 - momentum).add_(unbiased_var.to(running_var), alpha=momentum)


def coefficients(norm: Norm, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 (N or 1, C)."""
    scale = statistics.invstd * _weight(norm, statistics)
    bias = getattr(norm.module, "bias", None)
    shift = -statistics.mean * scale
    return scale, shift if bias is None else shift + bias.double()


def _weight(norm: Norm, statistics: Statistics) -> Tensor:
    weight = getattr(norm.module, "weight", None)
    if not isinstance(weight, Tensor):
        return torch.ones_like(statistics.mean)
    return weight.detach().double().expand_as(statistics.mean)


@dataclass
class NormGradient:
    """What backward knows once all readers are done; float64.

    `weight` and `bias` are (C,); `a` and `b`, (N or 1, C), are what the statistics add to dy.
    """

    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor


def gradient_of(
    norm: Norm,
    statistics: Statistics,
    total: Tensor,
    product: Tensor,
    exchange: Exchange | None = None,
) -> NormGradient:
    """Return the gradients that Σg and Σg·(y-mean), float64 (N, C), amount to.

    With an `exchange`, those of weight and bias are this rank's share of them.
    """
    dnormalised = product * statistics.invstd
    dmean = -_weight(norm, statistics) * statistics.invstd * total
    dvar = -0.5 * _weight(norm, statistics) * statistics.invstd.square() * dnormalised
    dmean, dvar = _over_domain(norm, dmean), _over_domain(norm, dvar)
    if exchange is not None:
        dmean, dvar = exchange.total(torch.stack([dmean, dvar]))
    if statistics.n is None or (exchange is not None and exchange.is_idle):
        a = b = torch.zeros_like(statistics.mean)
    else:
        a = (dmean - 2 * dvar * statistics.mean) / statistics.n
        b = 2 * dvar / statistics.n
    return NormGradient(dnormalised.sum(0), total.sum(0), a, b)


def _over_domain(norm: Norm, values: Tensor) -> Tensor:
    """Sum over what shares statistics, and hand the sum to all of them."""
    if norm.domain == "image":
        return values
    if norm.domain in ("batch", "fixed"):
        return values.sum(0, keepdim=True)
    grouped = values.view(len(values), norm.groups, -1)
    return grouped.sum(2, keepdim=True).expand_as(grouped).reshape(values.shape)
