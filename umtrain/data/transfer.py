"""Values sent from one process to another, large arrays through memory that both map.

# Note: [Images in nameless memory]
An image goes into a memfd whose descriptor travels with the message. It has no name that a killed
process could leave behind, needs no room in /dev/shm, and lives while somebody maps it: also when
its sender has died meanwhile. It is in nobody's heap, so no budget of the heap counts it.
"""

import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

_LARGE_BYTES = 2**16
_ALIGNMENT_BYTES = 64


def send(connection: Connection, value: object) -> None:
    """Send a picklable value; contiguous arrays of 64 KiB and more are copied once."""
    large: list[memoryview] = []

    def keep_inside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _LARGE_BYTES:
            return True
        large.append(view)
        return False

    content = pickle.dumps(value, protocol=5, buffer_callback=keep_inside)
    sizes_bytes = [view.nbytes for view in large]
    if not large:
        connection.send_bytes(pickle.dumps((content, sizes_bytes)))
        return
    with os.fdopen(os.memfd_create("umtrain-image"), "wb") as memory:
        for start, view in zip(_starts(sizes_bytes), large, strict=False):
            memory.seek(start)
            memory.write(view)
        memory.truncate(_starts(sizes_bytes)[-1])
        memory.flush()
        connection.send_bytes(pickle.dumps((content, sizes_bytes)))
        send_handle(connection, memory.fileno(), None)


def receive(connection: Connection) -> Any:
    """Return what `send` sent; EOFError or OSError if the other end is gone."""
    content, sizes_bytes = pickle.loads(connection.recv_bytes())
    if not sizes_bytes:
        return pickle.loads(content)
    handle = recv_handle(connection)
    starts = _starts(sizes_bytes)
    try:
        memory = memoryview(mmap.mmap(handle, starts[-1]))
    finally:
        os.close(handle)
    buffers = [
        memory[start : start + n_bytes] for start, n_bytes in zip(starts, sizes_bytes, strict=False)
    ]
    return pickle.loads(content, buffers=buffers)


def _starts(sizes_bytes: Sequence[int]) -> list[int]:
    """Return where each buffer starts, and last where all end."""
    starts = [0]
    for n_bytes in sizes_bytes:
        starts.append(-(-(starts[-1] + n_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
    return starts
