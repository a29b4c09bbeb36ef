"""Which host tier explicit copies go to, by device."""

from umtrain.memory.allocator import HeapHoles
from umtrain.memory.options import Options
from umtrain.memory.swap import Channel
from umtrain.memory.trace import Trace
from umtrain.memory.working_set import WorkingSets


def create_channel(options: Options, measured: WorkingSets, trace: Trace) -> Channel:
    """Return the tier for `options.device`, with room for what is saved where it can be reserved.

    Raises DeviceError or OutOfMemoryError if host memory has not that room.
    """
    if options.device == "cuda":
        from umtrain.memory.pool_cuda import TorchCudaDriver
        from umtrain.memory.swap_pinned import PinnedChannel

        return PinnedChannel(TorchCudaDriver(), "cuda", options.host_budget_bytes)
    from umtrain.memory.swap_file import FileChannel

    holes = HeapHoles(measured.largest_saved_bytes)
    room_bytes, limit_bytes = measured.saved_bytes, options.host_budget_bytes
    return FileChannel(options.spill_dir, room_bytes, limit_bytes, trace, holes)
