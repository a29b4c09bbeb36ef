"""Pages of saved tensors in CUDA managed memory: the tensors themselves, never copied.

# Note: [Nothing migrates before its last reader]
# Autograd and the forward pass share the pages. A group is evicted when forward has left it, but
# a tensor in it may have a reader still to come: a residual connection, a U-Net skip. Whoever is
# still to read a tensor refers to its storage, so a storage that nobody but autograd refers to
# has had its last reader. The migration is queued behind the compute issued so far.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from umtrain.memory.cuda_driver import CudaDriver, Event
from umtrain.memory.layout import Layout, span_of
from umtrain.memory.meters import Meter
from umtrain.memory.paging import Paged, Pager
from umtrain.memory.trace import Trace, now_s

# The driver's unit of eviction; ranges are merged and aligned to it.
MANAGED_BLOCK_BYTES = 2 * 2**20


class ManagedBlock(Paged):
    """A saved tensor in managed memory, and where its pages were last asked to go."""

    is_in = False

    def __init__(self, pager: "ManagedPager", tensor: torch.Tensor, layout: Layout) -> None:
        self._pager = pager
        self._tensor = tensor
        self.span = span_of(tensor, layout.span_bytes)
        self.n_bytes = layout.span_bytes
        self.is_in = True
        self.migrated: Event | None = None

    @property
    def has_forward_reader(self) -> bool:
        """Return whether anything but autograd refers to the storage."""
        own = 3  # self._tensor, self.span, and the storage object in this expression
        return int(torch._C._storage_Use_Count(self.span.untyped_storage()._cdata)) > own

    def __del__(self) -> None:
        if self.is_in:
            self._pager.forget(self.n_bytes)

    def load(self, layout: Layout) -> torch.Tensor:
        """Return the tensor; pages that are out come in by page faults."""
        self._pager.before_reading(self)
        return layout.on_span(self.span)


class ManagedPager(Pager):
    """Queues migrations of managed ranges on a stream of its own for each direction."""

    def __init__(
        self,
        driver: CudaDriver,
        device: str,
        room_bytes: int | None,
        meter: Meter,
        trace: Trace,
        serving: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._driver = driver
        self._device = device
        self._room_bytes = room_bytes
        self._meter = meter
        self._trace = trace
        self._serving = serving
        self._in_bytes = 0

    def around_step(self) -> AbstractContextManager[None]:
        """Return the context in which torch allocates from the managed pool."""
        self._in_bytes = 0
        return self._serving()

    def wants(self, tensor: torch.Tensor) -> bool:
        """See `Mover`."""
        return tensor.device.type == self._device

    def move(self, tensor: torch.Tensor, layout: Layout) -> ManagedBlock:
        """Keep `tensor` where it is: its pages can migrate."""
        block = ManagedBlock(self, tensor, layout)
        self._in_bytes += block.n_bytes
        return block

    def forget(self, n_bytes: int) -> None:
        """Take note that a block that was in is gone."""
        self._in_bytes -= n_bytes

    def room_bytes(self) -> int | None:
        """See `Pager`."""
        return self._room_bytes

    def before_reading(self, block: ManagedBlock) -> None:
        """Let compute wait for a migration in flight; count a demand fault otherwise."""
        counters = self._meter.counters
        if not block.is_in:
            self._trace.add("fault", "on demand", now_s(), block.n_bytes)
            counters.add(swapped_in_bytes=block.n_bytes)
            self._mark_in(block)
        elif block.migrated is not None:
            is_hit = self._driver.is_done(block.migrated)
            counters.add(**{"prefetch_hits" if is_hit else "prefetch_late": 1})
        if block.migrated is not None:
            self._driver.wait("compute", block.migrated)
            block.migrated = None

    def page_in(self, name: str, blocks: Sequence[Paged]) -> None:
        """Migrate whole blocks in and let compute wait for them."""
        event = self._migrate_in(name, _out(blocks))
        if event is not None:
            self._driver.wait("compute", event)

    def prefetch(self, name: str, blocks: Sequence[Paged]) -> None:
        """Begin to migrate blocks in, as far as the budget has room."""
        fitting, n_bytes = [], self._in_bytes
        for block in _out(blocks):
            n_bytes += block.n_bytes
            if self._room_bytes is not None and n_bytes > self._room_bytes:
                break
            fitting.append(block)
        event = self._migrate_in(name, fitting)
        for block in fitting:
            block.migrated = event

    def evict(self, name: str, blocks: Sequence[Paged]) -> None:
        """Queue migrations to the host behind the compute issued so far."""
        start_s = now_s()
        leaving = [b for b in blocks if isinstance(b, ManagedBlock) and b.is_in]
        if not leaving:
            return
        self._driver.wait("out", self._driver.record("compute"))
        for address, n_bytes in inner_ranges(leaving):
            self._driver.prefetch(address, n_bytes, "host", "out")
        event = self._driver.record("out")
        for block in leaving:
            block.is_in = False
            block.migrated = event
            self._in_bytes -= block.n_bytes
        total_bytes = sum(block.n_bytes for block in leaving)
        self._meter.counters.add(swapped_out_bytes=total_bytes, host_bytes=total_bytes)
        self._trace.add("swap-out", name, start_s, total_bytes)

    def close(self) -> None:
        """Wait for the migrations in flight."""
        self._driver.synchronize()

    def _migrate_in(self, name: str, blocks: Sequence[ManagedBlock]) -> Event | None:
        if not blocks:
            return None
        start_s = now_s()
        for event in dict.fromkeys(b.migrated for b in blocks if b.migrated is not None):
            self._driver.wait("in", event)
        for address, n_bytes in outer_ranges(blocks):
            self._driver.prefetch(address, n_bytes, "device", "in")
        for block in blocks:
            block.migrated = None
            self._mark_in(block)
        total_bytes = sum(block.n_bytes for block in blocks)
        self._meter.counters.add(swapped_in_bytes=total_bytes)
        self._trace.add("swap-in", name, start_s, total_bytes)
        return self._driver.record("in")

    def _mark_in(self, block: ManagedBlock) -> None:
        block.is_in = True
        self._in_bytes += block.n_bytes


def _out(blocks: Sequence[Paged]) -> list[ManagedBlock]:
    return [block for block in blocks if isinstance(block, ManagedBlock) and not block.is_in]


def outer_ranges(blocks: Iterable[ManagedBlock]) -> list[tuple[int, int]]:
    """Return the (address, bytes) of whole 2 MiB blocks that hold the tensors, merged."""
    unit = MANAGED_BLOCK_BYTES
    spans = [
        (b.span.data_ptr() // unit * unit, -(-(b.span.data_ptr() + b.n_bytes) // unit) * unit)
        for b in blocks
    ]
    return [(start, end - start) for start, end in _merge(spans)]


def inner_ranges(blocks: Iterable[ManagedBlock]) -> list[tuple[int, int]]:
    """Return the (address, bytes) of whole 2 MiB blocks that hold nothing but the tensors.

    A block shared with a tensor that is not among them does not migrate.
    """
    unit = MANAGED_BLOCK_BYTES
    merged = _merge([(b.span.data_ptr(), b.span.data_ptr() + b.n_bytes) for b in blocks])
    aligned = [(-(-start // unit) * unit, end // unit * unit) for start, end in merged]
    return [(start, end - start) for start, end in aligned if end > start]


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
