"""The passes over a strip in PyTorch's own operations: for every device, and the reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from umtrain.streaming.kernels import Affine, Kernels, arithmetic_dtype


def _per_channel(coefficient: Tensor) -> Tensor:
    return coefficient.view(1, -1, 1, 1)


def _value(terms: Sequence[Affine], dtype: torch.dtype) -> Tensor:
    total: Tensor | None = None
    for term in terms:
        value = term.y.to(dtype)
        if term.scale is not None and term.shift is not None:
            value = torch.addcmul(_per_channel(term.shift), value, _per_channel(term.scale))
        total = value if total is None else total + value
    assert total is not None
    return total


class TorchKernels(Kernels):
    """See `Kernels`; arithmetic in float32, or float64 for float64 strips."""

    def moments(self, x: Tensor, shift: Tensor, copy: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if copy is not None:
            copy.copy_(x)
        centred = x.to(arithmetic_dtype(x.dtype)) - _per_channel(shift)
        dims = (0, 2, 3)
        return centred.sum(dims).double(), centred.square().sum(dims).double()

    def blend(self, terms: Sequence[Affine], relu: bool, out: Tensor) -> None:
        """See `Kernels`."""
        value = _value(terms, arithmetic_dtype(out.dtype))
        out.copy_(value.relu() if relu else value)

    def blend_backward(
        self,
        terms: Sequence[Affine],
        relu: bool,
        dz: Tensor,
        g: Tensor,
        add: bool,
        means: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Kernels`."""
        dtype = arithmetic_dtype(dz.dtype)
        passed = dz.to(dtype)
        if relu:
            passed = passed.masked_fill(_value(terms, dtype) <= 0, 0)
        dims = (0, 2, 3)
        products = [
            torch.zeros(dz.shape[1], dtype=torch.float64, device=dz.device)
            if mean is None
            else (passed * (term.y.to(dtype) - _per_channel(mean))).sum(dims).double()
            for term, mean in zip(terms, means, strict=True)
        ]
        total = passed.sum(dims).double()
        g.copy_(g + passed if add else passed)
        return total, products

    def finish(
        self, g: Tensor, scale: Tensor, y: Tensor | None, a: Tensor, b: Tensor, out: Tensor
    ) -> None:
        """See `Kernels`."""
        value = g.to(arithmetic_dtype(g.dtype)) * _per_channel(scale)
        if y is not None:
            value += torch.addcmul(_per_channel(a), y.to(value.dtype), _per_channel(b))
        out.copy_(value)
