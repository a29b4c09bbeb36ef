"""The narrow interface through which everything asynchronous on a GPU is asked for.

Behind it is `pool_cuda.CudaDriver` on a GPU and a recording fake in the tests, so that what moves
where, in which order and after which event is checked without one.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch

Location = Literal["device", "host"]
Stream = Literal["compute", "out", "in"]
Event = object


class CudaDriver(ABC):
    """Three streams, events between them, migrations of managed pages and copies."""

    @abstractmethod
    def prefetch(self, address: int, n_bytes: int, location: Location, stream: Stream) -> None:
        """Migrate the pages of a managed range to `location`, queued on `stream`."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Copy `source` to `target`, queued on `stream`."""

    @abstractmethod
    def allocate_pinned(self, n_bytes: int) -> torch.Tensor:
        """Return page-locked host memory, uint8 (n_bytes,)."""

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """Return an event that happens when what is queued on `stream` now is done."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Let `stream` go on only after `event`."""

    @abstractmethod
    def is_done(self, event: Event) -> bool:
        """Return whether `event` has happened."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all streams."""
