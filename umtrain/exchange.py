"""What processes that train one model together hand to the parts that know nothing of each other.

A rank is one of these processes. The models' norms, the streaming engine and the memory
strategies are given objects of these kinds; `umtrain.parallel` makes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """Rows that go to, or come from, another rank: dense, of any dtype."""

    rank: int
    content: Tensor


class Exchange(Protocol):
    """What ranks tell each other; all of them call the same methods in the same order.

    `is_idle` says that what this rank computes now counts for nothing: it holds a stand-in, for
    want of an image.
    """

    rank: int
    n_ranks: int
    device: torch.device
    is_idle: bool

    def gather(self, values: Tensor) -> Tensor:
        """Return every rank's `values`, of one shape: (n_ranks, *shape)."""

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' `values`, in a new tensor."""

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values."""

    def swap(self, outgoing: Sequence[Rows], incoming: Sequence[Rows]) -> None:
        """Send rows to other ranks, and fill `incoming` with what they send to this one."""


def _keeps_nothing(parameter: nn.Parameter, gradient: Tensor) -> bool:
    return False


@dataclass(frozen=True)
class Links:
    """How the parts of one process are tied to the other ranks; by default there are none.

    `statistics` joins the statistics of batch normalisation; `bands` says that each rank holds
    rows of every feature map, and of the model's inputs, of `n_input_rows`, `given_rows`.
    `on_gradient` is told of each parameter's gradient as soon as
    backward is done with it, and returns whether it has taken it over. `agree` returns what
    the first rank chooses.
    """

    statistics: Exchange | None = None
    bands: Exchange | None = None
    n_input_rows: int = 0
    on_gradient: Callable[[nn.Parameter, Tensor], bool] = _keeps_nothing
    agree: Callable[[str], str] = str


NO_LINKS = Links()


# Beyond its own rows a rank reads those that the windows of a first layer reach.
_MARGIN_ROWS = 64


def given_rows(n_rows: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """Return the rows of an input image that a rank is given, where each has a band of them."""
    first, last = n_rows * rank // n_ranks, n_rows * (rank + 1) // n_ranks
    return max(0, first - _MARGIN_ROWS), min(n_rows, last + _MARGIN_ROWS)


def join_moments(
    exchange: Exchange, mean: Tensor, square: Tensor, n: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and count over all ranks.

    `mean` and `square`, the sum of squared deviations from it, have one shape; `n` values are
    behind each. An idle rank counts for nothing. All are float64, the count ().
    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979).
    """
    counted = torch.as_tensor(n, dtype=torch.float64, device=mean.device).expand(1)
    if exchange.is_idle:
        counted, mean, square = counted * 0, torch.zeros_like(mean), torch.zeros_like(square)
    sent = torch.cat([counted, mean.double().flatten(), square.double().flatten()])
    found = exchange.gather(sent)
    counts, means, squares = found[:, :1], *found[:, 1:].chunk(2, dim=1)
    total = counts.sum().clamp(min=1)  # all of them may be idle
    joint = (counts * means).sum(0) / total
    spread = squares.sum(0) + (counts * (means - joint).square()).sum(0)
    return joint.view_as(mean), (spread / total).view_as(mean), total
