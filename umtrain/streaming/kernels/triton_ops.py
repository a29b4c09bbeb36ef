"""The passes over a strip in Triton, one kernel each: for NVIDIA GPUs.

A program of a kernel takes a run of pixels and a tile of channels. Sums over pixels are added up
in each program in fp32 and then over the programs in fp64, in a fixed order: no atomics, so that
two runs agree to the bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from umtrain.streaming.kernels import Affine, Kernels
from umtrain.streaming.kernels.torch_ops import TorchKernels

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_TILE = 128  # channels of a program at most
_ELEMENTS = 4096  # of a program's block
_PROGRAMS = 2048  # about as many, so that partial sums stay small


@triton.jit
def _blend(
    out, y1, y2, s1, s2, t, n_pixels, n_channels, run,
    has_s1: tl.constexpr, has_y2: tl.constexpr, has_s2: tl.constexpr, has_t: tl.constexpr,
    relu: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = channel < n_channels
    first = tl.program_id(0).to(tl.int64) * run
    scale1 = tl.load(s1 + channel, inside, 0.0) if has_s1 else 1.0
    scale2 = tl.load(s2 + channel, inside, 0.0) if has_s2 else 1.0
    shift = tl.load(t + channel, inside, 0.0) if has_t else 0.0
    for start in range(0, run, rows):
        pixel = first + start + tl.arange(0, rows)
        at = pixel[:, None] * n_channels + channel[None, :]
        known = (pixel < n_pixels)[:, None] & inside[None, :]
        value = tl.load(y1 + at, known, 0.0).to(tl.float32) * scale1
        if has_y2:
            value += tl.load(y2 + at, known, 0.0).to(tl.float32) * scale2
        value += shift
        if relu:
            value = tl.where(value < 0, 0.0, value)  # a NaN stays one
        tl.store(out + at, value, known)


@triton.jit
def _moments(
    x, copy, shift, sums, n_pixels, n_channels, run,
    has_copy: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = channel < n_channels
    first = tl.program_id(0).to(tl.int64) * run
    offset = tl.load(shift + channel, inside, 0.0)
    total = tl.zeros((tile,), tl.float32)
    square = tl.zeros((tile,), tl.float32)
    for start in range(0, run, rows):
        pixel = first + start + tl.arange(0, rows)
        at = pixel[:, None] * n_channels + channel[None, :]
        known = (pixel < n_pixels)[:, None] & inside[None, :]
        value = tl.load(x + at, known, 0.0)
        if has_copy:
            tl.store(copy + at, value, known)
        centred = tl.where(known, value.to(tl.float32) - offset, 0.0)
        total += tl.sum(centred, 0)
        square += tl.sum(centred * centred, 0)
    place = sums + tl.program_id(0).to(tl.int64) * 2 * n_channels + channel
    tl.store(place, total, inside)
    tl.store(place + n_channels, square, inside)


@triton.jit
def _blend_backward(
    g, dz, y1, y2, s1, s2, t, m1, m2, sums, n_pixels, n_channels, run,
    has_s1: tl.constexpr, has_y2: tl.constexpr, has_s2: tl.constexpr, has_t: tl.constexpr,
    relu: tl.constexpr, add: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = channel < n_channels
    first = tl.program_id(0).to(tl.int64) * run
    scale1 = tl.load(s1 + channel, inside, 0.0) if has_s1 else 1.0
    scale2 = tl.load(s2 + channel, inside, 0.0) if has_s2 else 1.0
    shift = tl.load(t + channel, inside, 0.0) if has_t else 0.0
    mean1 = tl.load(m1 + channel, inside, 0.0) if has_s1 else 0.0
    mean2 = tl.load(m2 + channel, inside, 0.0) if has_s2 else 0.0
    total = tl.zeros((tile,), tl.float32)
    product1 = tl.zeros((tile,), tl.float32)
    product2 = tl.zeros((tile,), tl.float32)
    for start in range(0, run, rows):
        pixel = first + start + tl.arange(0, rows)
        at = pixel[:, None] * n_channels + channel[None, :]
        known = (pixel < n_pixels)[:, None] & inside[None, :]
        passed = tl.load(dz + at, known, 0.0).to(tl.float32)
        if relu or has_s1:
            content1 = tl.load(y1 + at, known, 0.0).to(tl.float32)
        if has_y2 and (relu or has_s2):
            content2 = tl.load(y2 + at, known, 0.0).to(tl.float32)
        if relu:
            value = content1 * scale1 + shift
            if has_y2:
                value += content2 * scale2
            passed = tl.where(value <= 0, 0.0, passed)
        if has_s1 or has_s2:
            total += tl.sum(passed, 0)
        if has_s1:
            product1 += tl.sum(passed * (content1 - mean1), 0)
        if has_s2:
            product2 += tl.sum(passed * (content2 - mean2), 0)
        if add:
            passed += tl.load(g + at, known, 0.0).to(tl.float32)
        tl.store(g + at, passed, known)
    place = sums + tl.program_id(0).to(tl.int64) * 3 * n_channels + channel
    tl.store(place, total, inside)
    tl.store(place + n_channels, product1, inside)
    tl.store(place + 2 * n_channels, product2, inside)


@triton.jit
def _finish(
    out, g, y, s, a, b, n_pixels, n_channels, run,
    has_y: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = channel < n_channels
    first = tl.program_id(0).to(tl.int64) * run
    scale = tl.load(s + channel, inside, 0.0)
    shift = tl.load(a + channel, inside, 0.0) if has_y else 0.0
    slope = tl.load(b + channel, inside, 0.0) if has_y else 0.0
    for start in range(0, run, rows):
        pixel = first + start + tl.arange(0, rows)
        at = pixel[:, None] * n_channels + channel[None, :]
        known = (pixel < n_pixels)[:, None] & inside[None, :]
        value = tl.load(g + at, known, 0.0).to(tl.float32) * scale
        if has_y:
            value += tl.load(y + at, known, 0.0).to(tl.float32) * slope + shift
        tl.store(out + at, value, known)


class TritonKernels(Kernels):
    """See `Kernels`; float64 strips go to PyTorch's own operations."""

    def __init__(self) -> None:
        self._other = TorchKernels()

    def moments(self, x: Tensor, shift: Tensor, copy: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if x.dtype not in _TYPES:
            return self._other.moments(x, shift, copy)
        layout = _Layout(x)
        sums = layout.room_for_sums(2)
        room = x if copy is None else copy
        _moments[layout.grid](x, room, shift, sums, *layout.sizes, copy is not None, *layout.block)
        both = sums.sum(0, dtype=torch.float64)
        return both[0], both[1]

    def blend(self, terms: Sequence[Affine], relu: bool, out: Tensor) -> None:
        """See `Kernels`."""
        if out.dtype not in _TYPES:
            self._other.blend(terms, relu, out)
            return
        layout = _Layout(out)
        tensors, flags = _operands(terms, out)
        _blend[layout.grid](out, *tensors, *layout.sizes, *flags, relu, *layout.block)

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
        if dz.dtype not in _TYPES:
            return self._other.blend_backward(terms, relu, dz, g, add, means)
        layout = _Layout(dz)
        tensors, flags = _operands(terms, dz)
        m1, m2 = (dz if mean is None else mean for mean in (*means, None)[:2])
        sums = layout.room_for_sums(3)
        _blend_backward[layout.grid](
            g, dz, *tensors, m1, m2, sums, *layout.sizes, *flags, relu, add, *layout.block
        )
        total, *products = sums.sum(0, dtype=torch.float64)
        return total, products[: len(terms)]

    def finish(
        self, g: Tensor, scale: Tensor, y: Tensor | None, a: Tensor, b: Tensor, out: Tensor
    ) -> None:
        """See `Kernels`."""
        if g.dtype not in _TYPES:
            self._other.finish(g, scale, y, a, b, out)
            return
        layout = _Layout(out)
        content = g if y is None else y
        tensors = (out, g, content, scale, a, b)
        _finish[layout.grid](*tensors, *layout.sizes, y is not None, *layout.block)


class _Layout:
    """How a strip is shared out among programs."""

    def __init__(self, strip: Tensor) -> None:
        assert strip.is_contiguous(memory_format=torch.channels_last)
        n_images, channels, n_rows, columns = strip.shape
        pixels = n_images * n_rows * columns
        tile = min(_TILE, triton.next_power_of_2(channels))
        rows = max(1, _ELEMENTS // tile)
        n_tiles = triton.cdiv(channels, tile)
        runs = max(1, _PROGRAMS // n_tiles)
        run = triton.cdiv(triton.cdiv(pixels, runs), rows) * rows
        self.grid = (triton.cdiv(pixels, run), n_tiles)
        self.sizes = (pixels, channels, run)
        self.block = (rows, tile)
        self._channels, self._device = channels, strip.device

    def room_for_sums(self, n_sums: int) -> Tensor:
        """Return room for each program's sums, float32 (programs, n_sums, C)."""
        return torch.empty(self.grid[0], n_sums, self._channels, device=self._device)


def _operands(terms: Sequence[Affine], like: Tensor) -> tuple[tuple[Tensor, ...], tuple[bool, ...]]:
    """Return y1, y2, s1, s2, t, with `like` where there is none, and which there are."""
    first, second = terms[0], terms[1] if len(terms) == 2 else Affine(like)
    shifts = [term.shift for term in terms if term.shift is not None]
    shift = sum(shifts[1:], shifts[0]) if shifts else None
    y2 = second.y if len(terms) == 2 else None
    given = (first.y, y2, first.scale, second.scale, shift)
    tensors = tuple(like if tensor is None else tensor for tensor in given)
    flags = (first.scale is not None, y2 is not None, second.scale is not None, bool(shifts))
    return tensors, flags
