"""The loader: batches in an order that the seed fixes, prepared while the model trains.

# Note: [A batch without an image]
An image that cannot be read is left out of its batch, and of every later one; the other images
keep their place, their batch and their augmentation, all of which follow from seed, epoch and
row. So a batch may be smaller than planned, or empty, but an epoch has as many batches as ever.
What was read of an image after it was left out (another patch of the slide, say, while the first
was under way) is dropped too: which samples train does not depend on how far readers had got.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler, default_collate

from umtrain.data.dataset import RadiographDataset, SampleKey, SlideDataset
from umtrain.data.isolated import READ_LIMITS, Children, Limits, call_isolated, start_server
from umtrain.data.share import WHOLE, Share
from umtrain.data.skipped import Skipped
from umtrain.data.volume_dataset import VolumeDataset
from umtrain.errors import DataError

Batch = dict[str, Any]
ImageDataset = SlideDataset | RadiographDataset | VolumeDataset

# Two batches wait per reader, as readers are not equally fast; a large one trains for long, so
# that one is enough.
_LARGE_BATCH_BYTES = 64 * 2**20
# A reader holds a sample, what it is made from, its augmented copies, and the one that is sent.
_SAMPLE_COPIES = 4
# Another process may have killed the reader, so a second one tries.
_N_TRIES = 2


class EpochSampler(Sampler[SampleKey]):
    """Yields every position once, in order, or in an order of the epoch's own if `seed` is given.

    Of several processes each has its `share` of every batch. The epoch is part of what it yields:
    so readers that live for the whole run learn of it.
    """

    def __init__(self, n: int, seed: int | None, batch_size: int = 1, share: Share = WHOLE) -> None:
        self.epoch = 0
        self._n, self._seed = n, seed
        self._batch_size, self._share = batch_size, share

    def __len__(self) -> int:
        return len(self._own(range(self._n)))

    def __iter__(self) -> Iterator[SampleKey]:
        order: Sequence[int] = range(self._n)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(self._n).tolist()
        return iter([SampleKey(self.epoch, position) for position in self._own(order)])

    def _own(self, order: Sequence[int]) -> Sequence[int]:
        return order if self._share == WHOLE else self._share.of_epoch(order, self._batch_size)


class Loader:
    """Batches of a dataset, epoch by epoch; made by `make_loader`."""

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: EpochSampler,
        batch_size: int,
        drop_last: bool,
        readers: "_Readers",
        skipped: Skipped,
    ) -> None:
        self._dataset, self._sampler = dataset, sampler
        self._batch_size, self._drop_last = batch_size, drop_last
        self._readers, self._skipped = readers, skipped
        self._first_batch = 0

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        full, rest = divmod(len(self._sampler), self._batch_size)
        return full + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch; one whose images are all left out is {"id": []}.

        See Note: [A batch without an image]. Raises DataError if too many are left out.
        """
        keys = list(self._sampler)[: len(self) * self._batch_size]
        left = keys[self._first_batch * self._batch_size :]
        answers = self._readers.read(left, self._is_skipped)
        for first in range(0, len(left), self._batch_size):
            yield self._batch(left[first : first + self._batch_size], answers)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Make the next iteration that of `epoch`: its order and its augmentations.

        It begins with batch `first_batch`; those before it are not read.
        """
        self._sampler.epoch = epoch
        self._first_batch = first_batch

    def _is_skipped(self, key: SampleKey) -> bool:
        return self._dataset.record(key.position) in self._skipped

    def _batch(self, keys: Sequence[SampleKey], answers: "Iterator[_Answer]") -> Batch:
        samples = [self._settled(key, next(answers)) for key in keys]
        kept = [sample for sample in samples if sample is not None]
        return _collate(kept) if kept else {"id": []}

    def _settled(self, key: SampleKey, answer: "_Answer") -> "_Sample | None":
        """Return the sample that was asked for, or None once its image is left out."""
        record = self._dataset.record(key.position)
        if record in self._skipped:
            return None
        if isinstance(answer, DataError):
            self._skipped.add(record, key.epoch, answer)
            return None
        return answer


_Sample = dict[str, Any]
_Answer = _Sample | DataError | None


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    limits: Limits = READ_LIMITS,
    skipped: Skipped | None = None,
    share: Share = WHOLE,
) -> Loader:
    """Return batches of `dataset`: its samples' values stacked, images in channels-last memory.

    image is uint8 (batch, 3, res, res), uint16 (batch, 1, height, width) or uint16
    (batch, 1, depth, rows, columns); numbers become
    tensors and ids lists. With `workers`, as many reader processes prepare the next batches
    while the present one trains; batches are the same for any number of them. An image that
    cannot be read, that its reader dies of, or that goes over `limits` (besides which a reader may
    hold four samples), is left out and noted in `skipped`. Without workers there are no limits,
    and a decoder that crashes or hangs takes this process along. `share` is this process's part of
    each batch of all that train together, `batch_size` images at most.
    """
    readers: _Readers = _Here(dataset)
    if workers:
        batch_bytes = batch_size * dataset.sample_bytes
        n_ahead = 1 if batch_bytes > _LARGE_BATCH_BYTES else 2
        readers = _Processes(
            dataset, workers, workers * n_ahead * batch_size, _with_sample(limits, dataset)
        )
    sampler = EpochSampler(len(dataset), seed if shuffle else None, batch_size, share)
    ledger = Skipped(dataset.records) if skipped is None else skipped
    return Loader(dataset, sampler, batch_size, drop_last, readers, ledger)


class _Readers(Protocol):
    def read(
        self, keys: Sequence[SampleKey], is_skipped: Callable[[SampleKey], bool]
    ) -> Iterator[_Answer]:
        """Yield, in order, the sample of each key or what went wrong; None if it is skipped."""


class _Here:
    """Reads in this process, when asked."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def read(
        self, keys: Sequence[SampleKey], is_skipped: Callable[[SampleKey], bool]
    ) -> Iterator[_Answer]:
        for key in keys:
            yield None if is_skipped(key) else self._answer(key)

    def _answer(self, key: SampleKey) -> _Answer:
        try:
            return _read(self._dataset, key)
        except DataError as error:
            return error


class _Processes:
    """Reads in processes, `n_ahead` samples ahead."""

    def __init__(self, dataset: ImageDataset, workers: int, n_ahead: int, limits: Limits) -> None:
        # Now, not at the first batch: it imports torch while the model is made.
        start_server(__name__)
        self._n_ahead = n_ahead
        self._children = Children(partial(_read, dataset), workers, limits, _N_TRIES)

    def read(
        self, keys: Sequence[SampleKey], is_skipped: Callable[[SampleKey], bool]
    ) -> Iterator[_Answer]:
        pending: deque[Future[_Sample] | None] = deque()
        try:
            for key in keys:
                pending.append(None if is_skipped(key) else self._children.submit(key))
                if len(pending) > self._n_ahead:
                    yield _awaited(pending.popleft())
            while pending:
                yield _awaited(pending.popleft())
        finally:
            for future in pending:
                if future is not None:
                    future.cancel()


def _awaited(future: "Future[_Sample] | None") -> _Answer:
    if future is None:
        return None
    try:
        return future.result()
    except DataError as error:
        return error


def read_batch(dataset: ImageDataset, key: SampleKey) -> Batch:
    """Return one sample as a batch, read in a process of its own; DataError if that fails."""
    limits = _with_sample(READ_LIMITS, dataset)
    return _collate([call_isolated(partial(_read, dataset), key, limits)])


def _with_sample(limits: Limits, dataset: ImageDataset) -> Limits:
    memory_bytes = limits.memory_bytes + _SAMPLE_COPIES * dataset.sample_bytes
    return Limits(limits.timeout_s, memory_bytes)


def _read(dataset: ImageDataset, key: SampleKey) -> _Sample:
    """Return a sample, its tensors as arrays, the image's channels last."""
    sample: _Sample = dict(dataset[key])
    # Slides lie in memory as (rows, columns, channels): as such they are contiguous.
    sample["image"] = sample["image"].movedim(0, -1)
    return {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in sample.items()
    }


def _collate(samples: Sequence[_Sample]) -> Batch:
    """Return samples, as `_read` gives them, as one batch; stacked, nothing is reordered."""
    rest = [{key: value for key, value in s.items() if key != "image"} for s in samples]
    rows_first = [torch.from_numpy(sample["image"]) for sample in samples]
    stacked = rows_first[0][None] if len(samples) == 1 else default_collate(rows_first)
    return {"image": stacked.movedim(-1, 1), **default_collate(rest)}
