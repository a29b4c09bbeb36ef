"""The passes over a strip in C, compiled by the machine's own compiler when first needed.

Without a compiler there are no native kernels, which is said once.
"""

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from umtrain.compiler import c_compiler, compiled, failure_of
from umtrain.streaming.kernels import Affine, Kernels
from umtrain.streaming.kernels.torch_ops import TorchKernels

_log = logging.getLogger(__name__)

_SOURCES = ("strip.c", "strip_body.h")
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-std=gnu11"),
)
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


@cache
def native_kernels() -> Kernels | None:
    """Return the compiled kernels, compiling them if need be; None, said once, if that fails."""
    # torch brings OpenMP's library; the compiled file finds it loaded and shares its threads.
    try:
        return NativeKernels(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info(
            "memory=stream: no compiled kernels (%s); PyTorch's own are used, which are slower. "
            "Install a C compiler (cc) to change that",
            failure_of(error),
        )
        return None


def _compiled() -> Path:
    """Return the compiled file; raises OSError or SubprocessError where it cannot be made."""
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    return compiled(c_compiler(), sources, _FLAGS, [])


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class NativeKernels(Kernels):
    """See `Kernels`; for strips on the CPU. Dtypes that the C does not know go to PyTorch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._other = TorchKernels()

    def _call(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        if getattr(self._library, f"{name}_{_SUFFIX[dtype]}")(*arguments) != 0:
            raise MemoryError(f"{name}: not enough memory for the threads' sums")

    def moments(self, x: Tensor, shift: Tensor, copy: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if x.dtype not in _SUFFIX:
            return self._other.moments(x, shift, copy)
        pixels, channels = _extent(x)
        assert copy is None or _is_dense(copy, x)
        sums = torch.empty(2, x.shape[1], dtype=torch.float64)
        pointers = (_pointer(x), _pointer(copy), _pointer(shift))
        self._call("moments", x.dtype, *pointers, pixels, channels, _pointer(sums))
        return sums[0], sums[1]

    def blend(self, terms: Sequence[Affine], relu: bool, out: Tensor) -> None:
        """See `Kernels`."""
        if out.dtype not in _SUFFIX:
            return self._other.blend(terms, relu, out)
        pixels, channels = _extent(out)
        operands, _kept = _operands(terms, out)
        self._call("blend", out.dtype, _pointer(out), *operands, pixels, channels, int(relu))
        return None

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
        if dz.dtype not in _SUFFIX:
            return self._other.blend_backward(terms, relu, dz, g, add, means)
        pixels, channels = _extent(dz)
        assert _is_dense(g, dz)
        operands, _kept = _operands(terms, dz)
        m1, m2 = (*means, None)[:2]
        sums = torch.empty(3, dz.shape[1], dtype=torch.float64)
        flags = (int(relu), int(add), _pointer(sums))
        self._call(
            "blend_backward",
            dz.dtype,
            *(_pointer(g), _pointer(dz), *operands, _pointer(m1), _pointer(m2)),
            *(pixels, channels, *flags),
        )
        return sums[0], [sums[1], sums[2]][: len(terms)]

    def finish(
        self, g: Tensor, scale: Tensor, y: Tensor | None, a: Tensor, b: Tensor, out: Tensor
    ) -> None:
        """See `Kernels`."""
        if g.dtype not in _SUFFIX:
            return self._other.finish(g, scale, y, a, b, out)
        pixels, channels = _extent(out)
        pointers = [_pointer(tensor) for tensor in (out, g, y, scale, a, b)]
        self._call("finish", g.dtype, *pointers, pixels, channels)
        return None


def _operands(terms: Sequence[Affine], like: Tensor) -> tuple[list[ctypes.c_void_p], Tensor | None]:
    """Return y1, y2, s1, s2 and the joint shift as pointers, and what must outlive the call."""
    first = terms[0]
    second = terms[1] if len(terms) == 2 else Affine(like)
    assert all(_is_dense(term.y, like) for term in terms)
    shifts = [term.shift for term in terms if term.shift is not None]
    shift = shifts[0] if len(shifts) == 1 else sum(shifts) if shifts else None
    assert shift is None or isinstance(shift, Tensor)
    y2 = second.y if len(terms) == 2 else None
    tensors = (first.y, y2, first.scale, second.scale, shift)
    return [_pointer(tensor) for tensor in tensors], shift


def _is_dense(strip: Tensor, like: Tensor) -> bool:
    """Return whether a strip lies in memory as C expects it, shaped as `like`."""
    same = strip.shape == like.shape and strip.dtype == like.dtype
    return same and strip.is_contiguous(memory_format=torch.channels_last)


def _extent(strip: Tensor) -> tuple[ctypes.c_long, ctypes.c_long]:
    """Return pixels and channels of a strip, which must be dense in channels-last order."""
    n_images, channels, rows, columns = strip.shape
    assert strip.is_contiguous(memory_format=torch.channels_last), strip.stride()
    return ctypes.c_long(n_images * rows * columns), ctypes.c_long(channels)
