"""Host memory for the streaming engine that is a tensor, and counts what is written to it."""

import torch
from torch import Tensor


class Done:
    def wait(self) -> None:
        pass


class RamBlock:
    def __init__(self, host: "RamHost", n_bytes: int) -> None:
        self._host = host
        self._content = torch.empty(n_bytes, dtype=torch.uint8)

    def start_write(self, offset_bytes: int, source: Tensor) -> Done:
        self._content[offset_bytes : offset_bytes + source.nbytes] = source
        self._host.written_bytes += source.nbytes
        return Done()

    def start_read(self, offset_bytes: int, target: Tensor) -> Done:
        target.copy_(self._content[offset_bytes : offset_bytes + target.nbytes])
        return Done()


class RamHost:
    """Host memory that is a tensor."""

    def __init__(self) -> None:
        self.written_bytes = 0

    def room_bytes(self) -> int:
        return 2**50

    def take(self, n_bytes: int) -> RamBlock:
        return RamBlock(self, n_bytes)
