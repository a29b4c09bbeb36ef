"""Which host tier explicit copies go to, by device."""

from umtrain.memory.options import Options
from umtrain.memory.swap import Channel
from umtrain.memory.trace import Trace


def create_channel(options: Options, saved_bytes: int, trace: Trace) -> Channel:
    """Return the tier for `options.device`, with room for `saved_bytes` reserved where it can be.

    Raises DeviceError or OutOfMemoryError if host memory has not that room.
    """
    if options.device == "cuda":
        from umtrain.memory.pool_cuda import TorchCudaDriver
        from umtrain.memory.swap_pinned import PinnedChannel

        return PinnedChannel(TorchCudaDriver(), "cuda", options.host_budget_bytes)
    from umtrain.memory.swap_file import FileChannel

    return FileChannel(options.spill_dir, saved_bytes, options.host_budget_bytes, trace)
