"""What strips go through between convolutions, behind one interface with three implementations.

`native` is C, one pass over a strip that lies in the cache; `triton_ops` is the same for GPUs;
`torch_ops` is any device, any dtype, and what both are tested against. A strip is (k, C, rows, W)
in channels-last memory, dense. Coefficients are (C,) in the strip's arithmetic dtype: fp64 for
fp64, else fp32.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """A strip `y` with what it is multiplied by and what is added, per channel; None: as it is."""

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None


class Kernels(ABC):
    """The passes over a strip."""

    @abstractmethod
    def moments(self, x: Tensor, shift: Tensor, copy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sums over pixels of x - shift and of its square, float64 (C,).

        Copies `x` to `copy` on the way, where one is given.
        """

    @abstractmethod
    def blend(self, terms: Sequence[Affine], relu: bool, out: Tensor) -> None:
        """Set `out` to the sum of one or two terms, rectified if `relu`."""

    @abstractmethod
    def blend_backward(
        self,
        terms: Sequence[Affine],
        relu: bool,
        dz: Tensor,
        g: Tensor,
        add: bool,
        means: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Set `g` (add to it if `add`) to what of `dz` the blend's rectifier lets through.

        `g` may be `dz`. Returns, float64 (C,): the sum of it over pixels, and for each term with a
        scale the sum of it times y - mean (zeros for the others).
        """

    @abstractmethod
    def finish(
        self, g: Tensor, scale: Tensor, y: Tensor | None, a: Tensor, b: Tensor, out: Tensor
    ) -> None:
        """Set `out` to scale·g + a + b·y; a None `y` leaves the last two away."""


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that coefficients for strips of `dtype` have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def create_kernels(device: torch.device) -> Kernels:
    """Return the fastest kernels that this machine has for `device`."""
    from umtrain.streaming.kernels.torch_ops import TorchKernels

    if device.type == "cuda" and find_spec("triton") is not None:
        from umtrain.streaming.kernels.triton_ops import TritonKernels

        return TritonKernels()
    if device.type != "cpu":
        return TorchKernels()
    from umtrain.streaming.kernels.native import native_kernels

    return native_kernels() or TorchKernels()
