"""Single cases of a split, with pictures: the worst predictions, and one that is surely right."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from umtrain.console import Console
from umtrain.data.dataset import RadiographDataset, SampleKey
from umtrain.data.isolated import call_isolated
from umtrain.data.loader import read_batch
from umtrain.data.manifest import AnyRecord, Radiograph, Slide, Split, Volume
from umtrain.data.radiograph import read_radiograph
from umtrain.data.wsi import SlideFrame, SlideInfo, plan_frame, read_slide, slide_info
from umtrain.errors import DataError, OutOfMemoryError
from umtrain.evaluation.contours import Area, Level, MapGrid, ToL0, contour_collection
from umtrain.evaluation.gradcam import grad_cam
from umtrain.files import write_atomic, write_text
from umtrain.memory.base import Strategy
from umtrain.models.resnet import FEATURE_STRIDE_PX, FIRST_FEATURE_PX, split_classifier
from umtrain.report.overlays import Keypoints, map_beside_slide, save_picture, sva_on_film
from umtrain.tasks import Row, Task
from umtrain.training import autocast, input_dtype
from umtrain.volume_cases import ExplainVolume, volume_drawing

FOLDER = "cases"

_SHOWN_PX = 512
_LONGEST_NAME = 150
_FEATURE_GRID = MapGrid(FIRST_FEATURE_PX, FIRST_FEATURE_PX, FEATURE_STRIDE_PX)
# In the colours of the picture.
_GRAD_CAM_LEVELS = (
    Level(0.5, "Grad-CAM 0.5 of max", (33, 145, 140)),
    Level(0.75, "Grad-CAM 0.75 of max", (94, 201, 98)),
)

Case = dict[str, str]


class Chosen(NamedTuple):
    """A prediction to show, and why."""

    why: str
    row: Row


class SlideView(NamedTuple):
    """The square of a slide that a map lies on; see `read_slide` for what the three mean."""

    res: int
    fit: str = "resize"
    mpp: float | None = None


@dataclass(frozen=True)
class SlideMap:
    """A map over a slide: `values` (h, w), 0 or more, of which `most` is drawn as 1.

    `grid` places it on the square `view`. `levels` are contours of values / most; `meaning` labels
    the colours, `words` go in the caption.
    """

    values: NDArray[np.float32]
    most: float
    view: SlideView
    grid: MapGrid
    levels: tuple[Level, ...]
    meaning: str
    words: str

    @property
    def shares(self) -> NDArray[np.float64]:
        """The values as shares of `most`; a map of zeros stays one."""
        return self.values.astype(np.float64) / (self.most or 1.0)


Explain = Callable[[str], SlideMap]
Draw = Callable[[Row, Path], str]


def write_cases(
    task: Task,
    split: Split,
    rows: list[Row],
    run_dir: Path,
    console: Console,
    maps: AbstractContextManager[Any],
    *,
    n_cases: int,
    threshold: float = 0.5,
) -> list[Case]:
    """Draw the `n_cases` worst predictions of `split` and return {id, picture, caption} of each.

    `rows` are predictions as `task.predictions` returns them. For slides and volumes the most
    confident correct positive comes first, if there is one (`threshold` and above is positive), and
    `maps`, which is entered for them only, gives the map of each (see `grad_cam_maps` and, for
    volumes, `grad_cams`). Pictures are paths relative to `run_dir`; beside a slide's are its map
    (.npy) and contours (.geojson), beside a volume's its map. A case
    whose file cannot be read any more, or that memory runs out on, is left out, and `console` is
    told why.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    records = {record.id: record for record in task.manifest.split(split)}
    drawing: AbstractContextManager[Draw]
    if task.config.dataset.name == "wsi":
        chosen = choose_slides(rows, n_cases, threshold)
        drawing = _slide_drawing(task, records, maps)
    elif task.config.dataset.name == "ct":
        chosen = choose_slides(rows, n_cases, threshold)
        drawing = volume_drawing(task, split, maps)
    else:
        chosen = choose_films(rows, n_cases)
        drawing = nullcontext(partial(_draw_film, records))
    cases: list[Case] = []
    try:
        with drawing as draw, console.task(f"cases of {split}", len(chosen)) as bar:
            for done, (why, row) in enumerate(chosen, 1):
                place = folder / file_stem(split, row["id"])
                try:
                    caption = f"{why}: {draw(row, place)}"
                except (DataError, OutOfMemoryError) as error:
                    console.say(f"case {row['id']} of split {split} is left out: {error}")
                else:
                    picture = f"{FOLDER}/{place.name}.png"
                    cases.append({"id": row["id"], "picture": picture, "caption": caption})
                bar.update(done)
    except OutOfMemoryError as error:  # as the maps' strategy is set up
        console.say(f"no cases of split {split} are drawn: {error}")
    return cases


def remove_cases(run_dir: Path, split: Split) -> None:
    """Remove the files of an earlier evaluation of `split`."""
    for old in (run_dir / FOLDER).glob(f"{split}-*"):
        old.unlink()


def choose_slides(rows: list[Row], n_cases: int, threshold: float) -> list[Chosen]:
    """Return the most confident correct positive, if any, then those farthest from their labels.

    That is the order of their unweighted losses. Equal ones are in the order of their ids. Last is
    the first positive by id, the one that all runs on the same slides have.
    """
    right = [row for row in rows if row["label"] == 1 and row["prob"] >= threshold]
    surest = sorted(right, key=lambda row: (-row["prob"], row["id"]))[:1]
    others = [row for row in rows if row not in surest]
    worst = sorted(others, key=lambda row: (-abs(row["label"] - row["prob"]), row["id"]))
    first = [Chosen("Most confident correct positive", row) for row in surest]
    chosen = first + _numbered(worst[:n_cases])
    positives = sorted((row for row in rows if row["label"] == 1), key=lambda row: str(row["id"]))
    return _with_common(chosen, positives, "First positive, the same in every run")


def choose_films(rows: list[Row], n_cases: int) -> list[Chosen]:
    """Return those with the largest errors of SVA; equal ones in the order of their ids.

    Last is the first by id, the one that all runs on the same films have.
    """
    worst = sorted(rows, key=lambda row: (-abs(row["sva_pred_mm"] - row["sva_true_mm"]), row["id"]))
    ordered = sorted(rows, key=lambda row: str(row["id"]))
    return _with_common(_numbered(worst[:n_cases]), ordered, "First, the same in every run")


def _with_common(chosen: list[Chosen], ordered: list[Row], why: str) -> list[Chosen]:
    missing = [row for row in ordered[:1] if all(row is not case.row for case in chosen)]
    return [*chosen, *(Chosen(why, row) for row in missing)]


def _numbered(rows: list[Row]) -> list[Chosen]:
    return [Chosen(f"Worst {at} of {len(rows)}", row) for at, row in enumerate(rows, 1)]


def file_stem(split: Split, record_id: str) -> str:
    """Return the name, without ending, of a case's files: safe, and another for every id.

    All but letters, digits and "_.-~" is written as "=" and hexadecimal bytes.
    """
    name = quote(record_id, safe="").replace("%", "=")
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(record_id.encode()).hexdigest()[:32]
        name = f"{name[:_LONGEST_NAME]}=-{digest}"  # "=-" is in no name that was not cut
    return f"{split}-{name}"


@contextmanager
def grad_cam_maps(
    task: Task, model: nn.Module, split: Split, create_strategy: Callable[[], Strategy]
) -> Iterator[Explain]:
    """Yield what makes the map of a slide of `split`, given its id, from `grad_cams`."""
    view = SlideView(task.config.res, task.config.dataset.fit, task.config.dataset.mpp)
    positive = str(task.data_facts["positive"])
    with grad_cams(task, model, split, create_strategy) as explain:
        yield lambda slide_id: _grad_cam_map(explain(slide_id), view, positive)


@contextmanager
def grad_cams(
    task: Task, model: nn.Module, split: Split, create_strategy: Callable[[], Strategy]
) -> Iterator[ExplainVolume]:
    """Yield what makes the Grad-CAM of a slide or volume of `split`, given its id.

    `model` is the trained network on its device, under no strategy. Its last feature map is made
    as evaluation makes it: in the same precision, under a strategy from `create_strategy`, without
    gradients. Maps are at the network's own stride. What is yielded raises DataError if the
    image cannot be read and OutOfMemoryError if memory runs out.
    """
    dataset = task.dataset(split, training=False)
    assert not isinstance(dataset, RadiographDataset)
    records: Sequence[Slide | Volume] = dataset.records
    positions = {record.id: at for at, record in enumerate(records)}
    device, precision = next(model.parameters()).device, task.config.precision
    dtype = input_dtype(precision)
    was_training = model.training
    backbone, head = split_classifier(model.eval())
    strategy = create_strategy()
    try:
        with strategy.guard(), autocast(device, precision):
            sample = torch.empty(
                (1, task.in_channels, *task.input_shape),
                dtype=dtype,
                device=device,
                memory_format=task.memory_format,
            )
            prepared = strategy.prepare_inference(backbone, sample)
        del sample

        def explain(image_id: str) -> NDArray[np.float32]:
            batch = read_batch(dataset, SampleKey(0, positions[image_id]))
            with strategy.guard(), autocast(device, precision):
                with torch.no_grad():
                    features = prepared(task.inputs(batch, device, dtype))
                values: NDArray[np.float32] = grad_cam(features, head)[0].float().cpu().numpy()
            return values

        yield explain
    finally:
        strategy.close()
        model.train(was_training)


def _grad_cam_map(values: NDArray[np.float32], view: SlideView, positive: str) -> SlideMap:
    most = float(values.max())
    if most > 0:
        meaning = "Grad-CAM, share of its maximum"
        words = (
            f"The map is Grad-CAM: how much each place raises the score of class {positive}, as a "
            "share of the map's own maximum. It is relative importance within this slide, not a "
            "probability."
        )
    else:
        meaning = "Grad-CAM: 0 everywhere"
        words = f"Grad-CAM is 0 everywhere: no place raises the score of class {positive}."
    return SlideMap(values, most, view, _FEATURE_GRID, _GRAD_CAM_LEVELS, meaning, words)


@contextmanager
def _slide_drawing(
    task: Task, records: dict[str, AnyRecord], maps: AbstractContextManager[Explain]
) -> Iterator[Draw]:
    positive = str(task.data_facts["positive"])
    with maps as explain:

        def draw(row: Row, place: Path) -> str:
            slide = records[row["id"]]
            assert isinstance(slide, Slide)
            explained = explain(slide.id)
            label = "positive" if row["label"] == 1 else "negative"
            title = f"label: {label}      predicted probability of positive: {row['prob']:.3f}"
            n_contours = write_slide_map(place, slide, explained, title)
            file = f"{FOLDER}/{place.name}.geojson"
            contours = f"Contours for QuPath: {file}." if n_contours else "It has no contours."
            return (
                f"{slide.id}, label {slide.label} ({label}), predicted probability of class "
                f"{positive}: {row['prob']:.3f}. {explained.words} {contours}"
            )

        yield draw


def write_slide_map(place: Path, slide: Slide, explained: SlideMap, title: str) -> int:
    """Write a map over a slide to `place` + .npy, .geojson and .png.

    Contours are in level-0 pixels from where QuPath counts, which the file names as `origin_px`.

    `title` heads the picture. Returns the number of contours. Raises DataError if the slide cannot
    be read.
    """
    res, fit, mpp = explained.view
    # The same square at another size, read anew: from a coarse level, so it costs next to nothing.
    shown_mpp = None if mpp is None else mpp * res / _SHOWN_PX
    read = partial(read_slide, res=_SHOWN_PX, fit=fit, mpp=shown_mpp, slide_mpp=slide.mpp)
    picture, shown = call_isolated(read, slide.path)
    info = call_isolated(slide_info, slide.path)
    frame = plan_frame(info, res, fit, mpp, slide.mpp)
    own_mpp = slide.mpp if slide.mpp is not None else info.mpp
    shares, grid = explained.shares, explained.grid
    area = _slide_area(frame, info, res)
    contours = contour_collection(shares, grid, area, explained.levels, _to_qupath(frame, info))
    canvas = map_beside_slide(
        picture,
        grid.raster(shares, res, _SHOWN_PX),
        title=title,
        meaning=explained.meaning,
        levels=[level.value for level in explained.levels],
        um_per_px=None if own_mpp is None else own_mpp * shown.scale,
    )
    write_atomic(_file(place, ".npy"), lambda stream: np.save(stream, explained.values))
    contours["origin_px"] = list(info.qupath_origin_px)
    write_text(_file(place, ".geojson"), json.dumps(contours, allow_nan=False))
    save_picture(canvas, _file(place, ".png"))
    return len(contours["features"])


def _to_qupath(frame: SlideFrame, info: SlideInfo) -> ToL0:
    """Return the map from the square to the pixels that QuPath shows."""
    origin_x, origin_y = info.qupath_origin_px

    def to_qupath(x_px: float, y_px: float) -> tuple[float, float]:
        l0_x, l0_y = frame.to_l0(x_px, y_px)
        return l0_x - origin_x, l0_y - origin_y

    return to_qupath


def _slide_area(frame: SlideFrame, info: SlideInfo, res: int) -> Area:
    """Return what the slide fills of the square."""
    left, top = frame.to_out(0, 0)
    right, bottom = frame.to_out(info.width_px, info.height_px)
    return Area(max(0.0, left), max(0.0, top), min(float(res), right), min(float(res), bottom))


def _file(place: Path, ending: str) -> Path:
    return place.with_name(place.name + ending)


def _draw_film(records: dict[str, AnyRecord], row: Row, place: Path) -> str:
    film = records[row["id"]]
    assert isinstance(film, Radiograph)
    true, predicted = (_keypoints(row, kind) for kind in ("true", "pred"))
    spacing_mm = row["row_mm_per_px"], row["mm_per_px"]
    canvas = sva_on_film(
        call_isolated(read_radiograph, film.path).pixels, true, predicted, spacing_mm
    )
    save_picture(canvas, _file(place, ".png"))
    return (
        f"{film.id}, SVA {true.sva_mm:+.1f} mm, predicted {predicted.sva_mm:+.1f} mm, error "
        f"{abs(predicted.sva_mm - true.sva_mm):.1f} mm. SVA is positive where C7 is in front of "
        f"S1; this patient faces {row['facing']}."
    )


def _keypoints(row: Row, kind: str) -> Keypoints:
    c7, s1 = ((row[f"{name}_x_{kind}"], row[f"{name}_y_{kind}"]) for name in ("c7", "s1"))
    return Keypoints(c7, s1, row[f"sva_{kind}_mm"])
