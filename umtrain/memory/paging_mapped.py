"""Pages of saved tensors in a memory-mapped spill file, moved by the OS's own calls.

A saved tensor is copied into the file once; backward reads it in place. Pages that were taken out
come back by page faults, or by one `MADV_POPULATE_READ` for a whole block. When the heap and the
pages of the pool together pass the device budget, the least recently used go out.

# Note: [Nothing is copied where all of it fits]
# A GPU's managed pages are the tensors themselves; here the pool costs a copy. Where the budget
# holds a step twice over (heaps fragment), no page would ever go out, and saved tensors stay on
# the heap.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from umtrain.memory import linux
from umtrain.memory.budget import DeviceBudget
from umtrain.memory.io_threads import start_io_threads
from umtrain.memory.layout import Layout
from umtrain.memory.meters import Meter
from umtrain.memory.paging import Paged, Pager
from umtrain.memory.spill import SpillBlock, SpillFile
from umtrain.memory.trace import Trace, now_s
from umtrain.memory.working_set import WorkingSets


@dataclass
class _Pages:
    """The state of one block's pages."""

    offset: int
    n_bytes: int
    is_in: bool = True
    is_clean: bool = False
    is_prefetched: bool = False
    migration: Future[None] | None = None

    @property
    def is_migrating(self) -> bool:
        """Return whether a thread is busy with them."""
        return self.migration is not None and not self.migration.done()

    def finish(self) -> None:
        """Wait for the thread that is busy with them; raises what it raised."""
        if self.migration is not None:
            self.migration.result()
            self.migration = None


class MappedBlock(Paged):
    """A saved tensor in the spill file."""

    def __init__(self, pager: "MappedPager", block: SpillBlock) -> None:
        self._pager = pager
        self.block = block
        self.n_bytes = block.n_bytes

    @property
    def has_forward_reader(self) -> bool:
        """Return False: forward reads the heap's original, never the copy in the file."""
        return False

    def load(self, layout: Layout) -> torch.Tensor:
        """Return the tensor in place, on the mapping."""
        self._pager.before_reading(self)
        return layout.rebuild(self.block.as_bytes())


class MappedPager(Pager):
    """Keeps what fits of the pool in RAM; one thread moves pages out, one moves them in."""

    def __init__(
        self,
        directory: Path | None,
        measured: WorkingSets,
        host_budget_bytes: int | None,
        room_bytes: Callable[[], int | None],
        meter: Meter,
        trace: Trace,
    ) -> None:
        self._spill = SpillFile(directory, measured.saved_bytes, host_budget_bytes, self._forget)
        self._plenty_bytes = 2 * measured.step_bytes
        self._is_needed = True
        self._room_bytes = room_bytes
        self._meter = meter
        self._trace = trace
        self._lock = threading.Lock()
        self._pages: OrderedDict[int, _Pages] = OrderedDict()  # least recently used first
        self._in_bytes = 0
        self._outward = start_io_threads("page-out")
        self._inward = start_io_threads("page-in")

    @property
    def is_needed(self) -> bool:
        """See `Mover`."""
        return self._is_needed

    def begin(self, budget: DeviceBudget) -> None:
        """See `Pager` and Note: [Nothing is copied where all of it fits]."""
        self._is_needed = not budget.holds(self._plenty_bytes)

    def wants(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is in RAM at all, and may have to leave it."""
        return self._is_needed and tensor.device.type == "cpu"

    def move(self, tensor: torch.Tensor, layout: Layout) -> MappedBlock:
        """Copy `tensor` into the file; its pages are in."""
        block = self._spill.take(layout.room_bytes)
        self._make_room(block.n_bytes)
        block.write(tensor, layout)
        with self._lock:
            self._pages[block.offset] = _Pages(block.offset, block.n_bytes)
            self._in_bytes += block.n_bytes
        self._meter.counters.raise_to(host_bytes=self._spill.used_bytes)
        return MappedBlock(self, block)

    def room_bytes(self) -> int | None:
        """See `Pager`: the budget less the heap."""
        return self._room_bytes()

    def before_reading(self, block: MappedBlock) -> None:
        """Wait for a migration of `block` in flight; if it is out, let page faults fetch it."""
        self._spill.collect()
        pages = self._pages[block.block.offset]
        self._finish_migration(pages)
        if not pages.is_in:
            self._make_room(pages.n_bytes)
            self._count_in(pages)
            start_s = now_s()
            self._trace.add("fault", "on demand", start_s, pages.n_bytes)
        with self._lock:
            self._pages.move_to_end(pages.offset)

    def page_in(self, name: str, blocks: Sequence[Paged]) -> None:
        """Fault whole blocks in, one call each."""
        start_s, n_bytes = now_s(), 0
        self._spill.collect()
        for pages in self._pages_of(blocks):
            self._finish_migration(pages)
            if pages.is_in:
                continue
            self._make_room(pages.n_bytes)
            self._count_in(pages)
            self._populate(pages)
            n_bytes += pages.n_bytes
        if n_bytes:
            self._meter.counters.add(stall_s=self._trace.add("swap-in", name, start_s, n_bytes))

    def prefetch(self, name: str, blocks: Sequence[Paged]) -> None:
        """Read ahead in the inward thread, as far as the budget has room."""
        self._spill.collect()
        for pages in self._pages_of(blocks):
            if pages.is_in or pages.is_migrating:
                continue
            if not self._fits(pages.n_bytes):
                return
            self._count_in(pages)
            pages.is_prefetched = True
            pages.migration = self._inward.submit(self._read_ahead, name, pages)

    def evict(self, name: str, blocks: Sequence[Paged]) -> None:
        """Write back and page out in the outward thread."""
        for pages in self._pages_of(blocks):
            if pages.is_in and not pages.is_migrating:
                pages.migration = self._outward.submit(self._page_out, name, pages)

    def close(self) -> None:
        """Stop both threads and give the file back."""
        self._outward.shutdown()
        self._inward.shutdown()
        self._spill.close()

    def _pages_of(self, blocks: Sequence[Paged]) -> list[_Pages]:
        return [self._pages[b.block.offset] for b in blocks if isinstance(b, MappedBlock)]

    def _fits(self, n_bytes: int) -> bool:
        room_bytes = self._room_bytes()
        return room_bytes is None or self._in_bytes + n_bytes <= room_bytes

    def _make_room(self, n_bytes: int) -> None:
        """Take out the least recently used blocks until `n_bytes` more fit."""
        room_bytes = self._room_bytes()
        if room_bytes is None:
            return
        with self._lock:
            candidates = [pages for pages in self._pages.values() if pages.is_in]
        for pages in candidates:
            if self._in_bytes + n_bytes <= room_bytes:
                return
            start_s = now_s()
            pages.finish()
            if pages.is_in:
                self._page_out("over budget", pages)
            self._meter.counters.add(stall_s=self._trace.add("stall", "making room", start_s))

    def _finish_migration(self, pages: _Pages) -> None:
        """Wait for what is in flight, and count whether a prefetch was in time."""
        if pages.is_prefetched:
            pages.is_prefetched = False
            in_time = not pages.is_migrating
            self._meter.counters.add(**{"prefetch_hits" if in_time else "prefetch_late": 1})
        if pages.is_migrating:
            self._wait(pages)
        pages.finish()  # raises what the thread raised, though it ended long ago

    def _wait(self, pages: _Pages) -> None:
        start_s = now_s()
        pages.finish()
        self._meter.counters.add(stall_s=self._trace.add("stall", "waiting for pages", start_s))

    def _count_in(self, pages: _Pages) -> None:
        with self._lock:
            pages.is_in = True
            self._in_bytes += pages.n_bytes
        self._meter.counters.add(swapped_in_bytes=pages.n_bytes)

    def _populate(self, pages: _Pages) -> None:
        linux.populate_read(self._spill.address + pages.offset, pages.n_bytes)

    def _read_ahead(self, name: str, pages: _Pages) -> None:
        start_s = now_s()
        self._populate(pages)
        self._trace.add("swap-in", name, start_s, pages.n_bytes)

    def _page_out(self, name: str, pages: _Pages) -> None:
        # Note: [Written back before paged out]
        # MADV_PAGEOUT only unmaps dirty pages and the page cache keeps them; clean ones it frees.
        # posix_fadvise then drops what no mapping refers to. A saved tensor never changes, so
        # a block that was written once goes out the second time without writing.
        start_s = now_s()
        address = self._spill.address + pages.offset
        if not pages.is_clean:
            self._spill.write_back(pages.offset, pages.n_bytes)
            pages.is_clean = True
        linux.page_out(address, pages.n_bytes)
        os.posix_fadvise(self._spill.fd, pages.offset, pages.n_bytes, os.POSIX_FADV_DONTNEED)
        with self._lock:
            pages.is_in = False
            self._in_bytes -= pages.n_bytes
        self._meter.counters.add(swapped_out_bytes=pages.n_bytes)
        self._trace.add("swap-out", name, start_s, pages.n_bytes)

    def _forget(self, offset: int) -> None:
        """Discard the pages of a block that is free again."""
        with self._lock:
            pages = self._pages.pop(offset, None)
        if pages is None:
            return
        pages.finish()
        if pages.is_in:
            with self._lock:
                self._in_bytes -= pages.n_bytes
            if self._room_bytes() is not None:
                linux.discard(self._spill.fd, offset, pages.n_bytes)
