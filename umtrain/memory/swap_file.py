"""Swapping to the spill file by explicit reads and writes in I/O threads.

# Note: [Room is allocated by the thread that computes]
# Without the pool of pages glibc gives every other thread a heap, which hands large buffers back;
# each copy in would then fault fresh pages in, a fifth of a step. The computing thread's heap
# recycles what it freed.
"""

from concurrent.futures import Future
from pathlib import Path

import torch

from umtrain.memory.allocator import HeapHoles
from umtrain.memory.io_threads import start_io_threads
from umtrain.memory.layout import Layout, span_of
from umtrain.memory.spill import SpillBlock, SpillFile
from umtrain.memory.swap import Channel, HostCopy
from umtrain.memory.trace import Trace, now_s
from umtrain.streaming.storage import ALIGNMENT_BYTES

_LARGE_BYTES = 2**20


def is_large(layout: Layout) -> bool:
    """Return whether a span is worth the room that a place like its address takes."""
    return layout.span_bytes >= _LARGE_BYTES


class FileCopy(HostCopy):
    """A storage span in the spill file; a large one lies so that direct I/O takes it as it is."""

    def __init__(self, channel: "FileChannel", block: SpillBlock, layout: Layout) -> None:
        self._channel = channel
        self._block = block
        self._layout = layout
        self._offset = layout.lead_bytes  # of the span in the block
        self._out: Future[None] | None = None
        self._in: Future[torch.Tensor] | None = None

    def start_out(self, source: torch.Tensor, layout: Layout) -> None:
        """See `HostCopy`."""
        if is_large(layout):
            self._offset = source.data_ptr() % ALIGNMENT_BYTES
        span = span_of(source, layout.span_bytes)
        self._out = self._channel.outward.submit(self._write, span)

    def is_out(self) -> bool:
        """See `HostCopy`."""
        if self._out is None or not self._out.done():
            return False
        self._out.result()
        return True

    def wait_out(self) -> None:
        """See `HostCopy`."""
        assert self._out is not None
        self._out.result()

    def start_in(self) -> None:
        """See `HostCopy`."""
        self._channel.holes.limit()
        # See Note: [Room is allocated by the thread that computes]
        room = torch.empty(self._layout.room_bytes + ALIGNMENT_BYTES, dtype=torch.uint8)
        shift = self._offset - self._layout.lead_bytes - room.data_ptr()
        self._in = self._channel.inward.submit(self._read, room[shift % ALIGNMENT_BYTES :])

    def is_in(self) -> bool:
        """See `HostCopy`."""
        return self._in is not None and self._in.done()

    def take_in(self) -> torch.Tensor:
        """See `HostCopy`."""
        assert self._in is not None
        room, self._in = self._in.result(), None
        return room

    def _write(self, span: torch.Tensor) -> None:
        start_s = now_s()
        self._block.write_at(self._offset, span)
        self._channel.trace.add("swap-out", "write", start_s, span.nbytes)

    def _read(self, room: torch.Tensor) -> torch.Tensor:
        start_s = now_s()
        span = room[self._layout.lead_bytes : self._layout.room_bytes]
        self._block.read_into(span, self._offset)
        self._channel.trace.add("swap-in", "read", start_s, span.nbytes)
        return room


class FileChannel(Channel):
    """The spill file, one thread writing, one reading."""

    def __init__(
        self,
        directory: Path | None,
        reserve_bytes: int,
        limit_bytes: int | None,
        trace: Trace,
        holes: HeapHoles,
    ) -> None:
        self._spill = SpillFile(directory, reserve_bytes, limit_bytes, is_direct=True)
        self.trace = trace
        self.holes = holes
        self.outward = start_io_threads("swap-out")
        self.inward = start_io_threads("swap-in")

    def serves(self, tensor: torch.Tensor) -> bool:
        """See `Channel`."""
        return tensor.device.type == "cpu"

    def reserve(self, layout: Layout) -> FileCopy:
        """See `Channel`."""
        self.holes.limit()
        lead_bytes = ALIGNMENT_BYTES if is_large(layout) else layout.lead_bytes
        block = self._spill.take(layout.span_bytes + lead_bytes)
        return FileCopy(self, block, layout)

    def used_bytes(self) -> int:
        """See `Channel`."""
        return self._spill.used_bytes

    def close(self) -> None:
        """See `Channel`."""
        self.outward.shutdown()
        self.inward.shutdown()
        self._spill.close()
