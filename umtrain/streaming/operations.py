"""The operations with neighbours: strips of input rows to strips of output rows, and back.

Each is told which rows its strips hold; rows outside of the map are padding and already in the
strip. `backward` returns the gradient of exactly the input rows that it was given.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from umtrain.streaming.rows import Enlargement, Window

_aten = torch.ops.aten
# By the number of dimensions.
_MAX = {2: _aten.max_pool2d_with_indices, 3: _aten.max_pool3d_with_indices}
_MAX_BACKWARD = {
    2: _aten.max_pool2d_with_indices_backward,
    3: _aten.max_pool3d_with_indices_backward,
}
_AVERAGE = {2: _aten.avg_pool2d, 3: _aten.avg_pool3d}
_AVERAGE_BACKWARD = {2: _aten.avg_pool2d_backward, 3: _aten.avg_pool3d_backward}


@dataclass(frozen=True)
class Weights:
    """What an operation learns, in the dtype that it computes in."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """The gradients of one strip; None where none was asked for."""

    source: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None


def channels_last(x: Tensor) -> Tensor:
    """Return `x`, of an image or a volume, in channels-last memory."""
    is_image = x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last if is_image else torch.channels_last_3d)


class Operation(ABC):
    """One operation that is run strip by strip."""

    @property
    def padding_value(self) -> float:
        """Return what stands in rows outside of the map."""
        return 0.0

    @abstractmethod
    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """Return the input rows that output rows [first, last) read."""

    @abstractmethod
    def moved(self, out_first: int, in_first: int) -> "Operation":
        """Return the operation on maps that begin with these rows of the whole ones."""

    @abstractmethod
    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """Return output rows [first, last) from the input rows that they read."""

    @abstractmethod
    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weights: Weights,
        first: int,
        last: int,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """Return the gradients of source, weight and bias that output rows' `dy` give."""


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution with zero padding, in 2D or 3D."""

    window: Window
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Operation`."""
        return self.window.input_rows(first, last)

    def moved(self, out_first: int, in_first: int) -> "Convolution":
        """See `Operation`."""
        return replace(self, window=self.window.moved(out_first, in_first))

    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """See `Operation`."""
        result: Tensor = _aten.convolution(
            z, weights.weight, weights.bias, *self._geometry(), False, self._no_padding, self.groups
        )
        return result

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weights: Weights,
        first: int,
        last: int,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """See `Operation`; without a second run of forward."""
        bias_sizes = None if weights.bias is None else weights.bias.shape
        source, weight, bias = _aten.convolution_backward(
            dy,
            z,
            weights.weight,
            bias_sizes,
            *self._geometry(),
            False,
            self._no_padding,
            self.groups,
            wanted,
        )
        return Gradients(source, weight, bias)

    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        return self.stride, (0, *self.padding[1:]), self.dilation

    @property
    def _no_padding(self) -> tuple[int, ...]:
        return (0,) * len(self.stride)


@dataclass(frozen=True)
class MaxPooling(Operation):
    """Max pooling; of equal values in a window the first counts, as in PyTorch."""

    window: Window
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    @property
    def padding_value(self) -> float:
        """See `Operation`: no maximum is outside of the map."""
        return -torch.inf

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Operation`."""
        return self.window.input_rows(first, last)

    def moved(self, out_first: int, in_first: int) -> "MaxPooling":
        """See `Operation`."""
        return replace(self, window=self.window.moved(out_first, in_first))

    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """See `Operation`."""
        result: Tensor = self._run(z)[0]
        return result

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weights: Weights,
        first: int,
        last: int,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """See `Operation`."""
        indices = self._run(z)[1]
        run = _MAX_BACKWARD[len(self.kernel)]
        return Gradients(run(channels_last(dy), z, *self._geometry(), indices))

    def _run(self, z: Tensor) -> tuple[Tensor, Tensor]:
        pooled, indices = _MAX[len(self.kernel)](z, *self._geometry())
        return pooled, indices

    def _geometry(self) -> tuple[object, ...]:
        return self.kernel, self.stride, (0, *self.padding[1:]), self.dilation, self.ceil_mode


@dataclass(frozen=True)
class AveragePooling(Operation):
    """Average pooling in which padding counts (`count_include_pad`), or there is none."""

    window: Window
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    divisor: int | None

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Operation`."""
        return self.window.input_rows(first, last)

    def moved(self, out_first: int, in_first: int) -> "AveragePooling":
        """See `Operation`."""
        return replace(self, window=self.window.moved(out_first, in_first))

    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """See `Operation`."""
        result: Tensor = _AVERAGE[len(self.kernel)](z, *self._geometry())
        return result

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weights: Weights,
        first: int,
        last: int,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """See `Operation`."""
        run = _AVERAGE_BACKWARD[len(self.kernel)]
        return Gradients(run(channels_last(dy), z, *self._geometry()))

    def _geometry(self) -> tuple[object, ...]:
        return self.kernel, self.stride, (0, *self.padding[1:]), False, True, self.divisor


@dataclass(frozen=True)
class Upsampling(Operation):
    """Upsampling by a whole factor: "nearest", or "bilinear" with align_corners=False.

    A strip is enlarged as if it were a whole map; the rows at its ends that would need the
    neighbours' rows are in the halo and cut away.
    """

    enlargement: Enlargement
    factors: tuple[int, int]
    mode: str

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Operation`."""
        return self.enlargement.input_rows(first, last)

    def moved(self, out_first: int, in_first: int) -> "Upsampling":
        """See `Operation`."""
        return replace(self, enlargement=self.enlargement.moved(out_first, in_first))

    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """See `Operation`."""
        skipped = self.enlargement.n_skipped(first, last)
        return self._enlarge(z)[:, :, skipped : skipped + last - first]

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weights: Weights,
        first: int,
        last: int,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """See `Operation`."""
        skipped = self.enlargement.n_skipped(first, last)
        n_images, channels, rows, columns = z.shape
        size = (rows * self.factors[0], columns * self.factors[1])
        full = dy.new_zeros((n_images, channels, *size)).to(memory_format=torch.channels_last)
        full[:, :, skipped : skipped + last - first] = dy
        scales = tuple(float(factor) for factor in self.factors)
        if self.mode == "nearest":
            source = _aten.upsample_nearest2d_backward(full, size, z.shape, *scales)
        else:
            source = _aten.upsample_bilinear2d_backward(full, size, z.shape, False, *scales)
        return Gradients(source)

    def _enlarge(self, z: Tensor) -> Tensor:
        scale = tuple(float(factor) for factor in self.factors)
        corners = None if self.mode == "nearest" else False
        return functional.interpolate(z, scale_factor=scale, mode=self.mode, align_corners=corners)


@dataclass(frozen=True)
class GlobalPooling(Operation):
    """A whole map to one value per channel: "avg", or "max", of equal values the first.

    `n_pixels` are those of the whole map, also where strips are of a band of it.
    """

    kind: str
    n_pixels: int

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Operation`; a strip of its input is reduced where it is."""
        return first, last

    def moved(self, out_first: int, in_first: int) -> "GlobalPooling":
        """See `Operation`; it looks at no row's number."""
        return self

    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """Return what the strip alone gives, float32 or float64 (k, C): its sum, or its maximum."""
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        return z.sum((2, 3), dtype=wide) if self.kind == "avg" else z.amax((2, 3)).to(wide)

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        weights: Weights,
        first: int,
        last: int,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        """See `Operation`; `dy` is (k, C), for "max" only where this strip holds the maximum."""
        if self.kind == "avg":
            spread = dy.to(z.dtype)[:, :, None, None].expand_as(z)
            return Gradients(spread.contiguous(memory_format=torch.channels_last))
        position = _first_maximum(z)[:, :, None]
        source = torch.zeros_like(z, memory_format=torch.contiguous_format)
        source.flatten(2).scatter_(2, position, dy.to(z.dtype)[:, :, None])
        return Gradients(source.contiguous(memory_format=torch.channels_last))


def _first_maximum(z: Tensor) -> Tensor:
    """Return where in its H·W values each channel of z (k, C, H, W) is largest first, (k, C).

    By columns, then by rows: over both at once a GPU's reduction takes half a GiB to work in.
    """
    largest, column = z.max(3)
    row = largest.argmax(2, keepdim=True)
    return (row * z.shape[3] + column.gather(2, row)).squeeze(2)
