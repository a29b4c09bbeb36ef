"""Swapping to pinned host memory by copies on streams of their own.

# Note: [Streams and the lifetime of what they copy]
# A copy out waits for the compute that made its source; the source may be freed once compute
# waits for the copy, as freed memory is used again by compute only. The room of a copy in is
# allocated by compute, so the copy waits for the compute before it, and its reader for the copy.
"""

from collections import defaultdict

import torch

from umtrain.errors import OutOfMemoryError
from umtrain.memory.cuda_driver import CudaDriver, Event
from umtrain.memory.layout import Layout, span_of
from umtrain.memory.swap import Channel, HostCopy
from umtrain.units import format_bytes


class PinnedCopy(HostCopy):
    """A storage span in a pinned buffer; the buffer is used again once this object is gone."""

    def __init__(self, channel: "PinnedChannel", layout: Layout, buffer: torch.Tensor) -> None:
        self._channel = channel
        self._layout = layout
        self._buffer = buffer
        self._device = torch.device("cpu")
        self._out: Event | None = None
        self._in: Event | None = None
        self._room: torch.Tensor | None = None

    def __del__(self) -> None:
        self._channel.give_back(self._buffer)

    def start_out(self, source: torch.Tensor, layout: Layout) -> None:
        """See `HostCopy`."""
        driver = self._channel.driver
        self._device = source.device
        driver.wait("out", driver.record("compute"))
        driver.copy(self._buffer, span_of(source, layout.span_bytes), "out")
        self._out = driver.record("out")

    def is_out(self) -> bool:
        """See `HostCopy`."""
        return self._channel.driver.is_done(self._out)

    def wait_out(self) -> None:
        """Let compute wait, not this thread: see Note: [Streams and the lifetime …]."""
        self._channel.driver.wait("compute", self._out)

    def start_in(self) -> None:
        """See `HostCopy`."""
        driver, layout = self._channel.driver, self._layout
        self._room = torch.empty(layout.room_bytes, dtype=torch.uint8, device=self._device)
        driver.wait("in", driver.record("compute"))
        driver.wait("in", self._out)
        driver.copy(self._room[layout.lead_bytes :], self._buffer, "in")
        self._in = driver.record("in")

    def is_in(self) -> bool:
        """See `HostCopy`."""
        return self._in is not None and self._channel.driver.is_done(self._in)

    def take_in(self) -> torch.Tensor:
        """See `HostCopy`."""
        assert self._room is not None
        self._channel.driver.wait("compute", self._in)
        room, self._room = self._room, None
        return room


class PinnedChannel(Channel):
    """Pinned buffers, kept from step to step by their size."""

    def __init__(self, driver: CudaDriver, device: str, limit_bytes: int | None) -> None:
        self.driver = driver
        self._device = device
        self._limit_bytes = limit_bytes
        self.held_bytes = 0
        self._used_bytes = 0
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def serves(self, tensor: torch.Tensor) -> bool:
        """See `Channel`."""
        return tensor.device.type == self._device

    def reserve(self, layout: Layout) -> PinnedCopy:
        """See `Channel`."""
        return PinnedCopy(self, layout, self.take(layout.span_bytes))

    def take(self, n_bytes: int) -> torch.Tensor:
        """Return a pinned buffer of `n_bytes`; raises OutOfMemoryError past the host budget."""
        if self._free[n_bytes]:
            buffer = self._free[n_bytes].pop()
        else:
            self._check_limit(self.held_bytes + n_bytes)
            buffer = self.driver.allocate_pinned(n_bytes)
            self.held_bytes += n_bytes
        self._used_bytes += n_bytes
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a buffer back for the next tensor of its size."""
        self._used_bytes -= buffer.nbytes
        self._free[buffer.nbytes].append(buffer)

    def used_bytes(self) -> int:
        """See `Channel`."""
        return self._used_bytes

    def close(self) -> None:
        """See `Channel`."""
        self.driver.synchronize()
        self._free.clear()

    def _check_limit(self, needed_bytes: int) -> None:
        if self._limit_bytes is not None and needed_bytes > self._limit_bytes:
            raise OutOfMemoryError(
                f"host memory ran out: {format_bytes(needed_bytes)} of pinned memory are needed "
                f"and memory.host_budget={format_bytes(self._limit_bytes)}; raise it or lower res"
            )
