"""Datasets: one manifest row in, one sample out, pixels still uint8 or uint16.

A sample is asked for by a `SampleKey`. What is random in it depends on the seed, the epoch and
the row alone, so neither the number of workers nor the order of the rows changes it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from umtrain.data.augment import RadiographAugment, SlideAugment
from umtrain.data.frame import (
    Affine,
    apply_letterbox,
    compose,
    inverse,
    network_width_px,
    plan_letterbox,
    transform,
)
from umtrain.data.manifest import Radiograph, Slide
from umtrain.data.radiograph import pixel_spacing_mm, read_radiograph
from umtrain.data.wsi import read_slide

# Which way is forwards for the patient, along x: the sign that makes SVA positive when C7 lies in
# front of the sacrum. Without a word on it in the manifest, to the right.
_FORWARDS: Mapping[str | None, int] = {"right": 1, "left": -1, None: 1}


# What a reader may keep of the films that it has read.
_KEPT_BYTES = 512 * 2**20


class SampleKey(NamedTuple):
    """Names a sample: in which epoch, and which position among the dataset's records."""

    epoch: int
    position: int


class PlacedFilm(NamedTuple):
    """A radiograph in the network's frame, the map there from stored pixels, and its spacing."""

    pixels: NDArray[np.uint16]
    to_network: Affine
    spacing_mm: tuple[float, float]


class SlideSample(TypedDict):
    """What a model needs of a slide.

    image: uint8 (3, res, res), RGB, a channels-last view. label: 0 or 1. index: position in
    the dataset.
    """

    image: torch.Tensor
    label: int
    id: str
    index: int


class RadiographSample(TypedDict):
    """What a model needs of a radiograph.

    image: uint16 (1, height, width). keypoints: float32 (2, 2), (x, y) of C7 and of S1 in pixels
    of `image`. to_stored: float64 (2, 3), the map from pixels of `image` to the stored file's.
    spacing_mm: float64 (2,), row and column spacing of the stored file. facing: +1 if forwards
    for the patient is to the right in the stored file, -1 if to the left. index: position in
    the dataset.
    """

    image: torch.Tensor
    keypoints: torch.Tensor
    to_stored: torch.Tensor
    spacing_mm: torch.Tensor
    facing: int
    id: str
    index: int


class SlideDataset(Dataset[SlideSample]):
    """Slides as squares of `res` pixels, read with `fit` at `mpp` (see `read_slide`).

    `labels` says which number each label of the manifest stands for. With `augment`, every epoch
    sees each slide changed in its own way.
    """

    def __init__(
        self,
        records: Sequence[Slide],
        labels: Mapping[str, int],
        res: int,
        *,
        fit: str = "resize",
        mpp: float | None = None,
        augment: SlideAugment | None = None,
        seed: int = 0,
    ) -> None:
        self.records = records
        self.sample_bytes = res * res * 3
        self.kept_bytes = 0
        self._labels = dict(labels)
        self._res = res
        self._fit = fit
        self._mpp = mpp
        self._augment = augment
        self._seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def record(self, position: int) -> Slide:
        """Return the manifest row that a sample is of."""
        return self.records[position]

    def __getitem__(self, key: SampleKey) -> SlideSample:
        """Read and augment one slide; DataError if it cannot be read."""
        slide = self.records[key.position]
        pixels, _ = read_slide(
            slide.path, self._res, fit=self._fit, mpp=self._mpp, slide_mpp=slide.mpp
        )
        if self._augment is not None:
            pixels = self._augment(pixels, sample_rng(self._seed, key))
        return SlideSample(
            image=torch.from_numpy(pixels).permute(2, 0, 1),
            label=self._labels[slide.label],
            id=slide.id,
            index=key.position,
        )


class RadiographDataset(Dataset[RadiographSample]):
    """Radiographs scaled into a frame `res` high, `aspect` times as wide (to a multiple of 64).

    The image keeps its aspect and is centred with zeros around it. Standing lateral films are
    about twice as high as wide. With `augment`, every epoch sees each image changed in its own
    way, its keypoints, map and facing with it.
    """

    def __init__(
        self,
        records: Sequence[Radiograph],
        res: int,
        *,
        aspect: float = 0.5,
        augment: RadiographAugment | None = None,
        seed: int = 0,
    ) -> None:
        self.records = records
        self.height_px = res
        self.width_px = network_width_px(res, aspect)
        self.sample_bytes = self.height_px * self.width_px * 2
        self.kept_bytes = min(len(records) * self.sample_bytes, _KEPT_BYTES)
        self._augment = augment
        self._seed = seed
        self._placed: dict[int, PlacedFilm] = {}

    def __len__(self) -> int:
        return len(self.records)

    def record(self, position: int) -> Radiograph:
        """Return the manifest row that a sample is of."""
        return self.records[position]

    def __getitem__(self, key: SampleKey) -> RadiographSample:
        """Read, place and augment one radiograph; DataError if it cannot be read."""
        record = self.records[key.position]
        pixels, to_network, spacing_mm = self._place(key.position)
        keypoints = np.array([[record.c7_x, record.c7_y], [record.s1_x, record.s1_y]])
        if self._augment is not None:
            placed = transform(keypoints, to_network)
            pixels, moved = self._augment(pixels, placed, sample_rng(self._seed, key))
            to_network = compose(moved, to_network)
        return RadiographSample(
            image=torch.from_numpy(pixels).unsqueeze(0),
            keypoints=torch.from_numpy(transform(keypoints, to_network).astype(np.float32)),
            to_stored=torch.from_numpy(inverse(to_network)),
            spacing_mm=torch.tensor(spacing_mm, dtype=torch.float64),
            facing=_FORWARDS[record.facing],
            id=record.id,
            index=key.position,
        )

    def _place(self, index: int) -> PlacedFilm:
        """Return the film in the network's frame; kept from the first epoch on while there is room.

        A film of 8 Mpixel takes longer to read and scale than a small network trains on it.
        """
        if index in self._placed:
            return self._placed[index]
        record = self.records[index]
        stored = read_radiograph(record.path)
        spacing_mm = pixel_spacing_mm(stored, record.mm_per_px, record.path)
        box = plan_letterbox(stored.pixels.shape, self.height_px, self.width_px)
        placed = PlacedFilm(apply_letterbox(stored.pixels, box), box.to_network, spacing_mm)
        if (len(self._placed) + 1) * self.sample_bytes <= _KEPT_BYTES:
            self._placed[index] = placed
        return placed


def sample_rng(seed: int, key: SampleKey) -> np.random.Generator:
    """Return the generator for all that is random in one sample."""
    return np.random.default_rng([seed, key.epoch, key.position])
