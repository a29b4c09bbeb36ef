"""The loader: batches in an order that the seed fixes, prepared while the model trains.

# Note: [Readers are clean processes]
Reader processes are forked from a fork server: a fresh process that has imported the readers and
nothing else. A fork of the training process itself would take along its threads' locks (OpenMP,
I/O threads, CUDA) and its mappings, and Python 3.12 and later warn of it. The server imports torch
once, which takes as long as it did in the training process; readers then start at once.
Images come back through shared memory, so they are copied once and are in nobody's heap.
"""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from umtrain.data.dataset import RadiographDataset, SampleKey, SlideDataset
from umtrain.data.share import WHOLE, Share
from umtrain.errors import DeviceError, UmtrainError
from umtrain.units import format_bytes

Batch = dict[str, Any]

_SHARED_MEMORY = Path("/dev/shm")
# Two batches wait per reader, as readers are not equally fast; a large one trains for long, so
# that one is enough.
_LARGE_BATCH_BYTES = 64 * 2**20


class EpochSampler(Sampler[SampleKey]):
    """Yields every position once, in order, or in an order of the epoch's own if `seed` is given.

    Of several processes each has its `share` of every batch; in training (`seed` is given) all
    have as many batches, see `Share.of_epoch`. The epoch is part of what it yields: so readers that
    live for the whole run learn of it.
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
        if self._share == WHOLE:
            return order
        return self._share.of_epoch(order, self._batch_size, stands_in=self._seed is not None)


class Loader:
    """Batches of a dataset, epoch by epoch; made by `make_loader`."""

    def __init__(self, batches: DataLoader[Any], sampler: EpochSampler) -> None:
        self._batches = batches
        self._sampler = sampler

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch.

        Raises the readers' DataError, and DeviceError if a reader process was killed.
        """
        try:
            for batch in self._batches:
                if isinstance(batch, UmtrainError):
                    raise batch
                yield batch
        except (RuntimeError, EOFError, ConnectionError) as error:
            # The latter two: its last batch lay in memory that only it could hand over.
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise DeviceError(
                f"a process that reads images was killed ({error}), most likely for want of "
                "memory; set dataset.workers=0 or a smaller number"
            ) from error

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`: its order and its augmentations."""
        self._sampler.epoch = epoch


def make_loader(
    dataset: SlideDataset | RadiographDataset,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    share: Share = WHOLE,
) -> Loader:
    """Return batches of `dataset`: its samples' values stacked, images in channels-last memory.

    image is uint8 (batch, 3, res, res) or uint16 (batch, 1, height, width); numbers become
    tensors and ids lists. With `workers`, as many reader processes prepare the next batches
    while the present one trains; batches are the same for any number of them. `share` is this
    process's part of each batch of all that train together, `batch_size` images at most.
    Raises DeviceError if /dev/shm cannot hold the batches under way.
    """
    sampler = EpochSampler(len(dataset), seed if shuffle else None, batch_size, share)
    options: dict[str, Any] = {}
    if workers:
        batch_bytes = batch_size * dataset.sample_bytes
        n_ahead = 1 if batch_bytes > _LARGE_BATCH_BYTES else 2
        # And one more, which is training.
        _check_shared_memory(batch_bytes * (workers * n_ahead + 1), workers)
        options = {
            "num_workers": workers,
            "prefetch_factor": n_ahead,
            "persistent_workers": True,
            "multiprocessing_context": _reader_context(),
            "worker_init_fn": _end_with_trainer,
        }
    batches = DataLoader(
        _Reporting(dataset),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=drop_last,
        # A generator of its own: the loader must not move torch's, which the model draws from.
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    return Loader(batches, sampler)


class _Reporting(Dataset[Any]):
    """Hands errors on as samples: a DataLoader would bury their text in a traceback."""

    def __init__(self, dataset: SlideDataset | RadiographDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        try:
            return self._dataset[key]
        except UmtrainError as error:
            return error


def collate(samples: Sequence[Any]) -> Batch | UmtrainError:
    """Return the samples as one batch, or the first error that stands in place of a sample."""
    for sample in samples:
        if isinstance(sample, UmtrainError):
            return sample
    rest = [{key: value for key, value in s.items() if key != "image"} for s in samples]
    # Slides lie in memory as (rows, columns, channels): stacked like that, nothing is reordered.
    rows_first = [sample["image"].permute(1, 2, 0) for sample in samples]
    stacked = rows_first[0][None] if len(samples) == 1 else default_collate(rows_first)
    return {"image": stacked.permute(0, 3, 1, 2), **default_collate(rest)}


def _end_with_trainer(_reader: int) -> None:
    """Make this reader end when the training process does, however that ends.

    torch's own watch looks at the parent, which is the fork server and outlives a killed trainer.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        wait([trainer.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_shared_memory(needed_bytes: int, workers: int) -> None:
    if not _SHARED_MEMORY.exists():
        return
    free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    if needed_bytes > free_bytes:
        raise DeviceError(
            f"{_SHARED_MEMORY} has {format_bytes(free_bytes)} free, but dataset.workers={workers} "
            f"needs {format_bytes(needed_bytes)} there for the images under way; set "
            "dataset.workers=0, or give a container more with --shm-size"
        )


def _reader_context() -> BaseContext:
    """Return how readers are started. See Note: [Readers are clean processes]."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Now, not at the first batch: it imports torch while the model is made, and readers do not
    # inherit a limit that is put on this process's memory later.
    forkserver.ensure_running()
    return context
