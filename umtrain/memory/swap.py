"""Explicit copies of saved tensors to host memory and back, overlapped with compute.

Where they go is a tier's business (`Channel`); when, is that of `Swapper`: out as soon as they
are saved, back ahead of use, in the reverse order of the last time each was saved.
"""

import weakref
from abc import ABC, abstractmethod
from collections import deque

import torch

from umtrain.memory.layout import Layout, span_of
from umtrain.memory.meters import Meter
from umtrain.memory.saved import Moved, Mover
from umtrain.memory.trace import Trace, now_s


class HostCopy(ABC):
    """The copy of one storage span in host memory."""

    @abstractmethod
    def start_out(self, source: torch.Tensor, layout: Layout) -> None:
        """Begin to copy the span that `source` uses out."""

    @abstractmethod
    def is_out(self) -> bool:
        """Return whether the copy out has finished; raises DeviceError if it failed."""

    @abstractmethod
    def wait_out(self) -> None:
        """Wait until it has."""

    @abstractmethod
    def start_in(self) -> None:
        """Begin to copy it back into fresh device memory."""

    @abstractmethod
    def is_in(self) -> bool:
        """Return whether the copy back has finished."""

    @abstractmethod
    def take_in(self) -> torch.Tensor:
        """Return what was copied back, waiting for it: uint8, as `Layout.rebuild` wants it."""


class Channel(ABC):
    """A host tier that copies go to, and the device they come from."""

    @abstractmethod
    def serves(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is on that device."""

    @abstractmethod
    def reserve(self, layout: Layout) -> HostCopy:
        """Set room aside in host memory; raises DeviceError or OutOfMemoryError if it is full."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Return the bytes of host memory in use."""

    @abstractmethod
    def close(self) -> None:
        """Finish the transfers in flight and give host memory back."""


class Swapped(Moved):
    """A saved tensor that is on its way out, out, on its way in, or in for its next reader."""

    def __init__(self, swapper: "Swapper", source: torch.Tensor, layout: Layout) -> None:
        self.position = -1
        self._swapper = swapper
        self._version = source._version
        self._readers = 1
        self._is_incoming = False
        self._room: torch.Tensor | None = None
        # Note: [The source lives until its copy is done]
        # Its memory must not be used again before, and the copy must be of what was saved.
        self.source: torch.Tensor | None = source
        self.layout = layout
        self.copy = swapper.channel.reserve(layout)
        self.copy.start_out(source, layout)

    @property
    def n_bytes(self) -> int:
        """Return its bytes in host memory."""
        return self.layout.room_bytes

    def saved_again(self) -> None:
        """Expect one more reader, and the first one earlier."""
        self._readers += 1
        self._swapper.saved_last(self)

    def let_go(self) -> None:
        """Free the source in device memory; its copy is done."""
        if self.source is not None and self.source._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {tuple(self.source.shape)} while it was swapped out"
            )
        self.source = None

    def start_in(self) -> bool:
        """Begin to swap in if it is out; returns whether that was begun."""
        if self.source is not None or self._is_incoming or self._room is not None:
            return False
        self.copy.start_in()
        self._is_incoming = True
        return True

    def load(self, layout: Layout) -> torch.Tensor:
        """Return the tensor, from the fastest place that it is in."""
        self._readers = max(0, self._readers - 1)
        if self.source is not None:
            return layout.on_span(span_of(self.source, layout.span_bytes))
        room = self._room if self._room is not None else self._swapper.bring_in(self)
        self._is_incoming = False
        self._room = room if self._readers else None
        return layout.rebuild(room)


class Swapper(Mover):
    """Swaps every saved tensor out, and ahead of its use in again, within a window of bytes."""

    def __init__(self, channel: Channel, window_bytes: int, meter: Meter, trace: Trace) -> None:
        self.channel = channel
        self._window_bytes = window_bytes
        self._meter = meter
        self._trace = trace
        self._outgoing: deque[Swapped] = deque()
        self._outgoing_bytes = 0
        self._schedule: list[weakref.ref[Swapped]] = []

    def start_step(self) -> None:
        """Forget the step before; what it left in flight is finished first."""
        self._finish_outgoing(0)
        self._schedule.clear()

    def wants(self, tensor: torch.Tensor) -> bool:
        """See `Mover`."""
        return self.channel.serves(tensor)

    def move(self, tensor: torch.Tensor, layout: Layout) -> Swapped:
        """Begin to swap `tensor` out; waits only if too much is on its way already."""
        self._finish_outgoing(self._window_bytes)
        swapped = Swapped(self, tensor, layout)
        self._outgoing.append(swapped)
        self._outgoing_bytes += swapped.n_bytes
        self.saved_last(swapped)
        counters = self._meter.counters
        counters.add(swapped_out_bytes=swapped.n_bytes)
        counters.raise_to(host_bytes=self.channel.used_bytes())
        return swapped

    def saved_last(self, swapped: Swapped) -> None:
        """Note that `swapped` was saved just now, hence is read before all others in backward."""
        swapped.position = len(self._schedule)
        self._schedule.append(weakref.ref(swapped))

    def finish_out(self) -> None:
        """Wait until everything is out."""
        self._finish_outgoing(0)

    def bring_in(self, swapped: Swapped) -> torch.Tensor:
        """Return a tensor that backward wants now, and begin to swap in those it wants next."""
        counters = self._meter.counters
        was_begun = not swapped.start_in()
        is_hit = was_begun and swapped.copy.is_in()
        counters.add(**{"prefetch_hits" if is_hit else "prefetch_late": int(was_begun)})
        self._finish_outgoing(self._window_bytes)
        start_s = now_s()
        room = swapped.copy.take_in()
        if not is_hit:
            counters.add(stall_s=self._trace.add("stall", "swap-in", start_s, swapped.n_bytes))
        counters.add(swapped_in_bytes=swapped.n_bytes)
        self._start_next(swapped)
        return room

    def _start_next(self, current: Swapped) -> None:
        """Begin to swap in what comes before `current` in the schedule, a window of it."""
        ahead_bytes = 0
        for position in range(current.position - 1, -1, -1):
            swapped = self._schedule[position]()
            if swapped is None or swapped.position != position:
                continue
            ahead_bytes += swapped.n_bytes
            if ahead_bytes > self._window_bytes:
                return
            swapped.start_in()

    def _finish_outgoing(self, allowed_bytes: int) -> None:
        """Let go of what is out; wait until at most `allowed_bytes` are on their way."""
        while self._outgoing:
            oldest = self._outgoing[0]
            if not oldest.copy.is_out():
                if self._outgoing_bytes <= allowed_bytes:
                    return
                start_s = now_s()
                oldest.copy.wait_out()
                self._meter.counters.add(stall_s=self._trace.add("stall", "swap-out", start_s))
            self._outgoing.popleft()
            self._outgoing_bytes -= oldest.n_bytes
            oldest.let_go()
