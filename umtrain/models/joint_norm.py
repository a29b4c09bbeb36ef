"""Batch normalisation over the images of all ranks, on any device and backend.

`torch.nn.SyncBatchNorm` does this on GPUs only. Here each rank finds count, mean and variance of
its own images, and all join them; in backward two sums per channel are added up. One message each
way, of a few numbers per channel, whatever the images' size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from umtrain.exchange import Exchange, join_moments


def joint_batch_norm(
    module: nn.modules.batchnorm._BatchNorm, x: Tensor, exchange: Exchange
) -> Tensor:
    """Normalise `x` (N, C, …), a part of a batch, as `module` would in training the whole batch.

    Updates the running statistics with those of the whole batch.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        others = [dim for dim in range(x.ndim) if dim != 1]
        var, mean = torch.var_mean(x.to(wide), others, correction=0)
        n = x.numel() // x.shape[1]
        mean, var, total = join_moments(exchange, mean, var * n, n)
        _update_running(module, mean, var * total / (total - 1).clamp(min=1))
        statistics = mean.to(wide), var.to(wide), total.to(wide)
    result: Tensor = _JointBatchNorm.apply(
        x, module.weight, module.bias, *statistics, module.eps, exchange
    )
    return result


def _update_running(
    module: nn.modules.batchnorm._BatchNorm, mean: Tensor, unbiased_var: Tensor
) -> None:
    if module.running_mean is None or module.running_var is None:
        return
    assert module.num_batches_tracked is not None
    module.num_batches_tracked += 1
    momentum = module.momentum
    weight = 1 / module.num_batches_tracked.double() if momentum is None else momentum
    for running, new in ((module.running_mean, mean), (module.running_var, unbiased_var)):
        running.copy_(running + weight * (new.to(running) - running))


class _JointBatchNorm(torch.autograd.Function):
    """A plain function of its inputs: what it saves goes where a memory strategy wants it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        total: Tensor,
        eps: float,
        exchange: Exchange,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps, ctx.exchange = eps, exchange
        return nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        # With fixed statistics; what flows through them is added below.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # See umtrain/streaming/README.md: dy += a + b·y, with the sums over all images.
        sums = exchange.total(torch.stack([dbias, dweight]))
        if not exchange.is_idle:
            invstd = (var + ctx.eps).rsqrt()
            b = -weight * sums[1] * invstd.square() / total
            a = -weight * sums[0] * invstd / total - b * mean
            shape = (-1, *(1 for _ in range(x.ndim - 2)))
            dx = dx + torch.addcmul(a.view(shape), x, b.view(shape)).to(dx.dtype)
        return dx, dweight, dbias, None, None, None, None, None
