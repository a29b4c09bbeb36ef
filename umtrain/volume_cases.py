"""Single CT volumes with pictures: the slice that Grad-CAM points at, and the heat over it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from umtrain.data.dataset import SampleKey
from umtrain.data.manifest import Split
from umtrain.data.volume_dataset import VolumeDataset
from umtrain.files import write_atomic
from umtrain.models.resnet3d import FEATURE_STRIDE_VOXELS
from umtrain.report.overlays import map_beside_slide, save_picture
from umtrain.tasks import Row, Task

# The Grad-CAM of the volume with an id: (d, h, w), 0 or more.
ExplainVolume = Callable[[str], NDArray[np.float32]]


@contextmanager
def volume_drawing(
    task: Task, split: Split, maps: AbstractContextManager[ExplainVolume]
) -> Iterator[Callable[[Row, Path], str]]:
    """Yield what draws a row of predictions at a place (+ .npy, .png) and returns its caption."""
    dataset = task.dataset(split, training=False)
    assert isinstance(dataset, VolumeDataset)
    positions = {record.id: at for at, record in enumerate(dataset.records)}
    positive = str(task.data_facts["positive"])
    with maps as explain:

        def draw(row: Row, place: Path) -> str:
            at = positions[row["id"]]
            heat = explain(row["id"])
            grey = dataset[SampleKey(0, at)]["image"][0].numpy()
            label = "positive" if row["label"] == 1 else "negative"
            title = f"label: {label}      predicted probability of positive: {row['prob']:.3f}"
            shown = _draw(grey, heat, title, place)
            write_atomic(place.with_name(f"{place.name}.npy"), lambda stream: np.save(stream, heat))
            return (
                f"{row['id']}, label {dataset.records[at].label} ({label}), predicted probability "
                f"of class {positive}: {row['prob']:.3f}. Slice {shown + 1} of {len(grey)} from "
                f"the feet, of the grid that the network sees: where {_meaning(heat, positive)}"
            )

        yield draw


def _meaning(heat: NDArray[np.float32], positive: str) -> str:
    if not heat.any():
        return f"Grad-CAM is 0, as everywhere: no place raises the score of class {positive}."
    return (
        f"Grad-CAM is largest: how much each place raises the score of class {positive}, as a "
        "share of the map's own maximum. It is relative importance within this volume, not a "
        "probability."
    )


def _draw(grey: NDArray[np.uint16], heat: NDArray[np.float32], title: str, place: Path) -> int:
    """Write the picture of the slice where `heat` is largest; return that slice of `grey`."""
    depth_stride, row_stride, column_stride = FEATURE_STRIDE_VOXELS
    deepest = int(heat.max(axis=(1, 2)).argmax())
    if not heat.any():
        deepest = len(heat) // 2
    shown = min(deepest * depth_stride, len(grey) - 1)
    shares = heat[deepest].astype(np.float64) / (float(heat.max()) or 1.0)
    rows = _nearest(grey.shape[1], row_stride, heat.shape[1])
    columns = _nearest(grey.shape[2], column_stride, heat.shape[2])
    picture = np.repeat((grey[shown] >> 8).astype(np.uint8)[..., None], 3, axis=2)
    canvas = map_beside_slide(
        picture,
        shares[np.ix_(rows, columns)],
        title=title,
        meaning="Grad-CAM, share of its maximum in the volume",
    )
    save_picture(canvas, place.with_name(f"{place.name}.png"))
    return shown


def _nearest(n_voxels: int, stride: int, n_positions: int) -> NDArray[np.intp]:
    """Return for each voxel the position of the feature map that is centred nearest to it."""
    return np.minimum(np.rint(np.arange(n_voxels) / stride), n_positions - 1).astype(np.intp)
