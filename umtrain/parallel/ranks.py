"""What a training loop needs in order to be one of several ranks that train one model.

`parallel=data` gives each rank its own images of every batch, `parallel=spatial` rows of every
feature map. Alone, all of it does nothing.
"""

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, Self, TypeVar

from torch import Tensor, nn

from umtrain.config import RunConfig
from umtrain.data.share import WHOLE, Share
from umtrain.data.skipped import Skipped
from umtrain.errors import DataError
from umtrain.exchange import Links, given_rows
from umtrain.memory.base import Strategy
from umtrain.models.norm import join_statistics
from umtrain.parallel.gradients import GradientSums
from umtrain.parallel.world import World, world

T = TypeVar("T")


def world_facts(config: RunConfig) -> dict[str, Any]:
    """Return what a run's record says of its ranks."""
    here = world()
    return {
        "n_ranks": here.n_ranks,
        "mode": None if here.is_alone else config.parallel,
        "sync_batchnorm": config.model.sync_batchnorm,
    }


class Ranks:
    """The ties between this rank's training and the others'.

    `share` is its part of each batch; where images, of `n_input_rows`, are spread by rows, that is
    all of it. With 0 rows the network is given whole images all the same.
    """

    def __init__(
        self, world: World, mode: str, sync_batchnorm: bool, n_input_rows: int = 0
    ) -> None:
        self.world, self._n_input_rows = world, n_input_rows
        self._is_spatial = mode == "spatial" and not world.is_alone
        self.joins_statistics = sync_batchnorm and not self._is_spatial and not world.is_alone
        self.share = WHOLE if self._is_spatial else Share(world.rank, world.n_ranks)
        self._sums: GradientSums | None = None

    @classmethod
    def of(cls, config: RunConfig, n_input_rows: int) -> Self:
        """Return the ties that a run has in the world that this process has joined."""
        return cls(world(), config.parallel, config.model.sync_batchnorm, n_input_rows)

    def tie(self, model: nn.Module, strategy: Strategy) -> None:
        """Make `model` the same on all ranks and tie it to them; before `strategy.prepare`."""
        if self.world.is_alone:
            return
        self.world.spread_weights(model)
        self._sums = GradientSums(model.parameters(), self.world)
        if self.joins_statistics:
            join_statistics(model, self.world)
        strategy.links = self._links(self._sums.take)

    def tie_inference(self, strategy: Strategy) -> None:
        """Tie an evaluation to the other ranks; before `strategy.prepare_inference`."""
        if not self.world.is_alone:
            strategy.links = self._links(lambda parameter, gradient: False)

    def _links(self, on_gradient: Callable[[nn.Parameter, Tensor], bool]) -> Links:
        return Links(
            statistics=self.world if self.joins_statistics else None,
            bands=self.world if self._is_spatial else None,
            n_input_rows=self._n_input_rows if self._is_spatial else 0,
            on_gradient=on_gradient,
            agree=self.world.tell,
        )

    def start_batch(self, ids: Sequence[str], is_last: bool) -> float:
        """Take note of this rank's images of a batch; return for how many its loss counts.

        `is_last` says that the step ends with it. Raises DataError if ranks that share an image's
        rows have not read the same ones.
        """
        self.world.is_idle = not ids
        if is_last and self._sums is not None:
            self._sums.start()
        if not self._is_spatial:
            return float(len(ids))
        read = self.world.collect(list(ids))
        if any(others != read[0] for others in read):
            raise DataError(
                f"parallel=spatial: not all processes could read the same images ({read}); see "
                "which were left out, and why, in what they said"
            )
        # Every rank has the loss of the whole image, which may count once.
        return len(ids) / self.world.n_ranks

    def finish_step(self, figures: Sequence[float]) -> list[float]:
        """Wait for the sums of gradients; return the sums of all ranks' figures."""
        self.world.is_idle = False
        if self._sums is not None:
            self._sums.finish()
        return self.world.sums(figures)

    def band_of(self, images: Tensor) -> Tensor:
        """Return the rows of images (N, C, H, W) that this rank's network is given, a view."""
        if not (self._is_spatial and self._n_input_rows):
            return images
        first, last = given_rows(self._n_input_rows, self.world.rank, self.world.n_ranks)
        return images[:, :, first:last]

    def in_order(self, rows_by_batch: list[list[T]]) -> list[T]:
        """Return all ranks' rows in the order of one process, given this rank's, batch by batch."""
        if self._is_spatial:
            return list(chain.from_iterable(rows_by_batch))
        batches = zip_longest(*self.world.collect(rows_by_batch), fillvalue=())
        return [row for parts in batches for part in parts for row in part]

    def joined(self, values: list[T]) -> list[T]:
        """Return all ranks' values of what each finds in its share."""
        return values if self._is_spatial else list(chain.from_iterable(self.world.collect(values)))

    def merge_skipped(self, skipped: Skipped) -> None:
        """Leave out what any rank has left out. Raises DataError if that is too much."""
        if not self.world.is_alone:
            for entries in self.world.collect(skipped.entries):
                skipped.merge(entries)

    def whole_sum(self, value: float) -> float:
        """Return the sum of all ranks' values of what each finds in its share."""
        return value if self._is_spatial else self.world.sums([value])[0]

    def spread_buffers(self, model: nn.Module) -> None:
        """Give all ranks the first one's running statistics, for evaluation and checkpoints."""
        self.world.spread(list(model.buffers()))

    def close(self) -> None:
        """Untie the model."""
        if self._sums is not None:
            self._sums.close()
