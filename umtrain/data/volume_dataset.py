"""CT volumes as samples: one manifest row in, grey values on the network's grid out."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from umtrain.data.ct import read_ct
from umtrain.data.dataset import SampleKey, sample_rng
from umtrain.data.manifest import Volume
from umtrain.data.volume_augment import VolumeAugment
from umtrain.data.volume_grid import Grid, HounsfieldWindow, resample

# What a reader may keep of the volumes that it has read.
_KEPT_BYTES = 512 * 2**20


class VolumeSample(TypedDict):
    """What a model needs of a volume.

    image: uint16 (1, depth, rows, columns). label: 0 or 1. index: position in the dataset.
    """

    image: torch.Tensor
    label: int
    id: str
    index: int


class VolumeDataset(Dataset[VolumeSample]):
    """CT volumes on `grid`, in `window` where the manifest states none for a volume.

    `labels` says which number each label of the manifest stands for. With `augment`, every epoch
    sees each volume changed in its own way.
    """

    def __init__(
        self,
        records: Sequence[Volume],
        labels: Mapping[str, int],
        grid: Grid,
        window: HounsfieldWindow,
        *,
        augment: VolumeAugment | None = None,
        seed: int = 0,
    ) -> None:
        self.records = records
        self.sample_bytes = int(np.prod(grid.shape)) * np.dtype(np.uint16).itemsize
        self.kept_bytes = min(len(records) * self.sample_bytes, _KEPT_BYTES)
        self._labels = dict(labels)
        self._grid = grid
        self._window = window
        self._augment = augment
        self._seed = seed
        self._placed: dict[int, NDArray[np.uint16]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def record(self, position: int) -> Volume:
        """Return the manifest row that a sample is of."""
        return self.records[position]

    def __getitem__(self, key: SampleKey) -> VolumeSample:
        """Read, place and augment one volume; DataError if it cannot be read."""
        volume = self.records[key.position]
        grey = self._place(key.position)
        if self._augment is not None:
            grey = self._augment(grey, sample_rng(self._seed, key))
        return VolumeSample(
            image=torch.from_numpy(grey).unsqueeze(0),
            label=self._labels[volume.label],
            id=volume.id,
            index=key.position,
        )

    def _place(self, index: int) -> NDArray[np.uint16]:
        """Return the volume on the grid; kept from the first epoch on while there is room.

        Reading a series of hundreds of files takes longer than a small network trains on it.
        """
        if index in self._placed:
            return self._placed[index]
        volume = self.records[index]
        grey = self._window_of(volume).grey(resample(read_ct(volume.path), self._grid))
        if (len(self._placed) + 1) * self.sample_bytes <= _KEPT_BYTES:
            self._placed[index] = grey
        return grey

    def _window_of(self, volume: Volume) -> HounsfieldWindow:
        center, width = volume.window_center, volume.window_width
        return HounsfieldWindow(
            self._window.center if center is None else center,
            self._window.width if width is None else width,
        )
