"""Host memory for the streaming engine: the spill file, or pinned memory and copy streams."""

from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from umtrain.memory.available import available_bytes
from umtrain.memory.cuda_driver import CudaDriver, Event
from umtrain.memory.io_threads import start_io_threads
from umtrain.memory.meters import Meter
from umtrain.memory.spill import SpillBlock, SpillFile
from umtrain.memory.swap_pinned import PinnedChannel
from umtrain.memory.trace import Trace, now_s
from umtrain.streaming.storage import HostBlock, HostMemory, Pending

_SHARE_OF_FREE = 0.85
_N_THREADS = 2  # each way: a disk with one request at a time is idle between them


class FileHost(HostMemory):
    """Blocks of a spill file, read by some threads and written by others.

    So transfers end in no particular order: who needs one waits for it.

    The file is made when something is to be put out. Raises DeviceError or OutOfMemoryError where
    there is no room.
    """

    def __init__(
        self, directory: Path | None, limit_bytes: int | None, meter: Meter, trace: Trace
    ) -> None:
        self._directory, self._limit_bytes = directory, limit_bytes
        self.meter, self.trace = meter, trace
        self._cleanup = ExitStack()
        self._spill: SpillFile | None = None
        self.reader = start_io_threads("stream-in", _N_THREADS)
        self.writer = start_io_threads("stream-out", _N_THREADS)
        for executor in (self.reader, self.writer):
            self._cleanup.callback(executor.shutdown)

    def room_bytes(self) -> int:
        """See `HostMemory`."""
        return self._file().capacity_bytes

    def reserve(self, n_bytes: int) -> None:
        """Make sure that the file has room for `n_bytes`."""
        if n_bytes:
            self._file().reserve(n_bytes)

    def take(self, n_bytes: int) -> HostBlock:
        """See `HostMemory`."""
        spill = self._file()
        block = spill.take(n_bytes)
        self.meter.counters.raise_to(host_bytes=spill.used_bytes)
        return _FileBlock(self, block)

    def _file(self) -> SpillFile:
        if self._spill is None:
            self._spill = SpillFile(self._directory, 0, self._limit_bytes, is_direct=True)
            self._cleanup.callback(self._spill.close)
        return self._spill

    def close(self) -> None:
        """End the threads and close the file."""
        self._cleanup.close()


class _FileBlock(HostBlock):
    def __init__(self, host: FileHost, block: SpillBlock) -> None:
        self._host, self._block = host, block

    def start_write(self, offset_bytes: int, source: Tensor) -> Pending:
        return _Job(self._host, self._host.writer.submit(self._write, offset_bytes, source))

    def start_read(self, offset_bytes: int, target: Tensor) -> Pending:
        return _Job(self._host, self._host.reader.submit(self._read, offset_bytes, target))

    def _write(self, offset_bytes: int, source: Tensor) -> None:
        start_s = now_s()
        self._block.write_at(offset_bytes, source)
        self._host.trace.add("swap-out", "strip", start_s, source.nbytes)
        self._host.meter.counters.add(swapped_out_bytes=source.nbytes)

    def _read(self, offset_bytes: int, target: Tensor) -> None:
        start_s = now_s()
        self._block.read_into(target, offset_bytes)
        self._host.trace.add("swap-in", "strip", start_s, target.nbytes)
        self._host.meter.counters.add(swapped_in_bytes=target.nbytes)


class _Job(Pending):
    def __init__(self, host: FileHost, job: "Future[None]") -> None:
        self._host, self._job = host, job

    def wait(self) -> None:
        if not self._job.done():
            start_s = now_s()
            self._job.exception()
            stalled_s = self._host.trace.add("stall", "strip", start_s)
            self._host.meter.counters.add(stall_s=stalled_s)
        self._job.result()


class PinnedHost(HostMemory):
    """Pinned buffers, copied to and from on streams of their own.

    See Note: [Streams and the lifetime of what they copy] in swap_pinned.py.
    """

    def __init__(self, driver: CudaDriver, limit_bytes: int | None, meter: Meter) -> None:
        self.driver, self.meter, self._limit_bytes = driver, meter, limit_bytes
        self._channel = PinnedChannel(driver, "cuda", limit_bytes)

    def room_bytes(self) -> int:
        """See `HostMemory`; without a host budget, most of what the machine has free."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        return self._channel.held_bytes + int(_SHARE_OF_FREE * available_bytes())

    def reserve(self, n_bytes: int) -> None:
        """Pinned memory is taken as it is needed."""

    def take(self, n_bytes: int) -> HostBlock:
        """See `HostMemory`."""
        block = _PinnedBlock(self, self._channel)
        block.buffer = self._channel.take(n_bytes)
        self.meter.counters.raise_to(host_bytes=self._channel.used_bytes())
        return block

    def close(self) -> None:
        """Wait for copies under way and let go of the buffers."""
        self._channel.close()


class _PinnedBlock(HostBlock):
    buffer: Tensor

    def __init__(self, host: PinnedHost, channel: PinnedChannel) -> None:
        self._host, self._channel = host, channel
        self._written: Event | None = None

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self._channel.give_back(self.buffer)

    def start_write(self, offset_bytes: int, source: Tensor) -> Pending:
        driver = self._host.driver
        driver.wait("out", driver.record("compute"))
        driver.copy(self.buffer[offset_bytes : offset_bytes + source.nbytes], source, "out")
        self._written = driver.record("out")
        self._host.meter.counters.add(swapped_out_bytes=source.nbytes)
        return _Queued(driver, self._written)

    def start_read(self, offset_bytes: int, target: Tensor) -> Pending:
        driver = self._host.driver
        driver.wait("in", driver.record("compute"))
        if self._written is not None:
            driver.wait("in", self._written)
        driver.copy(target, self.buffer[offset_bytes : offset_bytes + target.nbytes], "in")
        self._host.meter.counters.add(swapped_in_bytes=target.nbytes)
        return _Queued(driver, driver.record("in"))


class _Queued(Pending):
    def __init__(self, driver: CudaDriver, event: Event) -> None:
        self._driver, self._event = driver, event

    def wait(self) -> None:
        self._driver.wait("compute", self._event)
