"""Which images of each batch are whose, where several processes train together.

One batch of all processes is cut into runs of neighbours, as even as can be, the longer ones
first. So N processes with batches of b go through the images in the order of one with N·b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Part `rank` of `n_ranks` of every batch."""

    rank: int = 0
    n_ranks: int = 1

    def n_own(self, n: int) -> int:
        """Return how many of a batch's `n` images are its own."""
        return n // self.n_ranks + (self.rank < n % self.n_ranks)

    def of_batch(self, batch: Sequence[T]) -> Sequence[T]:
        """Return its own part of a batch."""
        first = sum(Share(rank, self.n_ranks).n_own(len(batch)) for rank in range(self.rank))
        return batch[first : first + self.n_own(len(batch))]

    def of_epoch(self, order: Sequence[T], batch_size: int) -> list[T]:
        """Return its own of all images of an epoch, in order; `batch_size` is that of one process.

        Cut into batches of `batch_size`, they are its parts of the batches of all; of the last
        batch it may have none.
        """
        own: list[T] = []
        together = batch_size * self.n_ranks
        for start in range(0, len(order), together):
            own += self.of_batch(order[start : start + together])
        return own


WHOLE = Share()
