"""Volumes in an engine of strips of rows: a slice is a row.

# Note: [Slices as rows]
# A feature map of a volume (N, C, D, H, W) in channels-last memory is the same bytes as a map
# (N, C, D, H·W) of D rows, channels-last too. So what works pixel by pixel, or sums up pixels,
# takes volumes as they are, and a strip of slices is contiguous. What looks at neighbours slides
# along the slices as it does along rows, and only has to see the other two dimensions apart: it
# is wrapped in `InPlanes`, which unfolds them, a view, and folds them again.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from umtrain.streaming.operations import Gradients, Operation, Weights

Plane = tuple[int, int] | None


def plane_of(x: Tensor) -> Plane:
    """Return rows and columns of a volume's slices; None for an image."""
    return (int(x.shape[3]), int(x.shape[4])) if x.ndim == 5 else None


def folded(x: Tensor) -> Tensor:
    """Return a volume (N, C, D, H, W) as (N, C, D, H·W), channels-last; images as they are."""
    if x.ndim != 5:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d).flatten(3)


def unfolded(x: Tensor, plane: Plane) -> Tensor:
    """Return what was `folded` as it was: a view."""
    return x if plane is None else x.view(*x.shape[:3], *plane)


@dataclass(frozen=True)
class InPlanes(Operation):
    """An operation of volumes, on slices of `plane`, that makes slices of `out_plane`."""

    inner: Operation
    plane: tuple[int, int]
    out_plane: tuple[int, int]

    @property
    def padding_value(self) -> float:
        """See `Operation`."""
        return self.inner.padding_value

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """See `Operation`."""
        return self.inner.input_rows(first, last)

    def moved(self, out_first: int, in_first: int) -> "InPlanes":
        """See `Operation`."""
        return replace(self, inner=self.inner.moved(out_first, in_first))

    def forward(self, z: Tensor, weights: Weights, first: int, last: int) -> Tensor:
        """See `Operation`."""
        return folded(self.inner.forward(unfolded(z, self.plane), weights, first, last))

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
        given, source = unfolded(dy, self.out_plane), unfolded(z, self.plane)
        found = self.inner.backward(given, source, weights, first, last, wanted)
        dz = None if found.source is None else folded(found.source)
        return Gradients(dz, found.weight, found.bias)
