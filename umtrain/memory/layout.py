"""Take a tensor's bytes and put them back elsewhere, with shape, strides and dtype untouched."""

from dataclasses import dataclass
from typing import Self

import torch

# Vectorised kernels may sum in another order at another alignment; the bytes of a cache line
# decide, so a tensor keeps its address modulo 64 wherever it is put.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on the span of storage that it uses."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    span_bytes: int
    lead_bytes: int  # address modulo ALIGNMENT_BYTES: left empty before the span

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the layout of a strided, non-empty tensor."""
        stride = tensor.stride()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, stride, strict=True))
        return cls(
            dtype=tensor.dtype,
            size=tensor.shape,
            stride=stride,
            span_bytes=(last + 1) * tensor.element_size(),
            lead_bytes=tensor.data_ptr() % ALIGNMENT_BYTES,
        )

    @property
    def room_bytes(self) -> int:
        """Return the bytes to set aside for it."""
        return self.lead_bytes + self.span_bytes

    def rebuild(self, room: torch.Tensor) -> torch.Tensor:
        """Return the tensor that lies in `room`, uint8 (room_bytes,) at an aligned address."""
        return self.on_span(room[self.lead_bytes : self.room_bytes])

    def on_span(self, span: torch.Tensor) -> torch.Tensor:
        """Return the tensor that lies on `span`, uint8 (span_bytes,), without a copy."""
        skipped, misfit = divmod(int(span.storage_offset()), self.dtype.itemsize)
        assert misfit == 0
        empty = torch.empty(0, dtype=self.dtype, device=span.device)
        return empty.set_(span.untyped_storage(), skipped, self.size, self.stride)


def span_of(tensor: torch.Tensor, span_bytes: int) -> torch.Tensor:
    """Return the storage bytes that `tensor` uses, uint8 (span_bytes,), without a copy."""
    start_bytes = tensor.storage_offset() * tensor.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), start_bytes, (span_bytes,), (1,))
