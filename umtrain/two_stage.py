"""The two-stage baseline, approach=two_stage: a network judges patches, a small model their map.

What the field does where a slide is too large for a network, and what training on whole slides is
compared with. The network needs masks of the training slides; the whole slide one label.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from umtrain.cases import Explain, SlideMap, SlideView, file_stem
from umtrain.checkpoint import FOLDER
from umtrain.config import RunConfig
from umtrain.console import Console
from umtrain.data.isolated import (
    READ_LIMITS,
    ChildFailedError,
    call_isolated,
    map_isolated,
)
from umtrain.data.loader import Batch, make_loader
from umtrain.data.manifest import Manifest, Slide, Split
from umtrain.data.masks import MASK_TEXT, check_mask_of
from umtrain.data.patches import GridDataset, GridPlan, plan_slide
from umtrain.data.wsi import plan_frame, slide_info
from umtrain.errors import DataError
from umtrain.evaluation.contours import Level, MapGrid
from umtrain.evaluation.probability_map import ProbabilityMap, empty_map, read_map, write_map
from umtrain.evaluation.slide_model import (
    SlideModel,
    fit_slide_model,
    map_features,
    read_slide_model,
    write_slide_model,
)
from umtrain.tasks import AnyManifest, Row, Task
from umtrain.tasks.patches import PatchTask
from umtrain.training import autocast, input_dtype

NAME = "two_stage"
MAPS = "maps"
SLIDE_MODEL = "slide_model.json"

_N_SHOWN = 20
_N_READERS = 2
_VIEW = SlideView(1024)
# Maps are drawn smooth between their positions: a patch is drawn as so many a side, all the same.
_DRAWN_PER_SIDE = 4
# In the colours of the picture.
_LEVELS = (
    Level(0.5, "cancer 0.5", (33, 145, 140)),
    Level(0.9, "cancer 0.9", (94, 201, 98)),
)


def network_task(task: Task) -> Task:
    """Return the task that the network of a run is trained on: patches, or `task` itself."""
    return _patch_task(task) if task.config.approach == NAME else task


def check_masks(manifest: AnyManifest) -> None:
    """Raise DataError, naming the rows, unless every training slide has a mask that fits it.

    Headers only: what the pixels hold is known when they are read.
    """
    train = cast(Manifest[Slide], manifest).split("train")
    lacking = [slide for slide in train if slide.mask is None or not slide.mask.is_file()]
    if not lacking:
        for error in map_isolated(check_mask_of, train, workers=_N_READERS, limits=READ_LIMITS):
            # Slides that cannot be read are left out when their turn comes.
            if isinstance(error, DataError) and not isinstance(error, ChildFailedError):
                raise error
        return
    lines = [
        f"  row {slide.row}: {slide.id} has "
        + ("no mask" if slide.mask is None else f"the mask {slide.mask}, which does not exist")
        for slide in lacking[:_N_SHOWN]
    ]
    if len(lacking) > _N_SHOWN:
        lines.append(f"  and {len(lacking) - _N_SHOWN} more")
    raise DataError(
        f"{manifest.path}: approach=two_stage learns from masks, and {len(lacking)} of "
        f"{len(train)} training slides lack one:\n" + "\n".join(lines) + "\n"
        f"Name it in the manifest's column mask: {MASK_TEXT}. Or use approach=no_fuss, which needs "
        "one label a slide"
    )


def annotation(config: RunConfig, manifest: AnyManifest) -> str:
    """Return what had to be annotated for a run's training, in words."""
    n_train = len(manifest.split("train"))
    if config.dataset.name == "ct":
        return f"one label for each of {n_train} training volumes"
    if config.dataset.name != "wsi":
        return f"two keypoints on each of {n_train} training radiographs"
    if config.approach == NAME:
        slides = cast(Manifest[Slide], manifest)
        n_val = sum(slide.mask is not None for slide in slides.split("val"))
        judged = f", masks of {n_val} validation slides" if n_val else ""
        return f"masks and labels of {n_train} training slides{judged}"
    return f"one label for each of {n_train} training slides"


def fit_slides(task: Task, model: nn.Module, run_dir: Path, console: Console) -> SlideModel:
    """Fit the slide model on the training slides' maps and store it; return it.

    `model` is the trained network of patches, as a strategy has prepared it.
    See Note: [Maps of training slides] in umtrain/evaluation/slide_model.py.
    """
    patches = _patch_task(task)
    features, labels = [], []
    for slide, values in probability_maps(patches, model, "train", run_dir, console):
        features.append(map_features(values))
        labels.append(patches.labels[slide.label])
    fitted = fit_slide_model(features, labels)
    write_slide_model(run_dir / FOLDER / SLIDE_MODEL, fitted)
    return fitted


def slide_rows(
    task: Task, model: nn.Module, split: Split, run_dir: Path, console: Console
) -> tuple[list[Row], float]:
    """Return rows {id, split, label, prob} of the slides of `split`, and their mean log loss.

    `model` is the trained network of patches, as a strategy has prepared it; the slide model is
    the run's. Keeps the slides' maps in the run's folder maps.
    Raises RunError if the slide model is missing, and DataError for slides that cannot be read.
    """
    fitted = read_slide_model(run_dir / FOLDER / SLIDE_MODEL)
    patches = _patch_task(task)
    rows: list[Row] = []
    for slide, values in probability_maps(patches, model, split, run_dir, console):
        prob = float(fitted.probability(map_features(values))[0])
        label = patches.labels[slide.label]
        rows.append({"id": slide.id, "split": split, "label": label, "prob": prob})
    return rows, _log_loss(rows)


def map_path(run_dir: Path, slide: Slide) -> Path:
    """Return where a run keeps the map of a slide."""
    stem = file_stem(slide.split, slide.id).removeprefix(f"{slide.split}-")
    return run_dir / MAPS / f"{stem}.npz"


@contextmanager
def cancer_maps(task: Task, split: Split, run_dir: Path) -> Iterator[Explain]:
    """Yield what gives the kept map of a slide of `split`, given its id: what Grad-CAM gives else.

    What is yielded raises DataError if the slide cannot be read, RunError if it has no map.
    """
    slides = {slide.id: slide for slide in _patch_task(task).slides.split(split)}
    yield lambda slide_id: _slide_map(slides[slide_id], run_dir)


def _slide_map(slide: Slide, run_dir: Path) -> SlideMap:
    kept = read_map(map_path(run_dir, slide))
    frame = plan_frame(call_isolated(slide_info, slide.path), *_VIEW, slide.mpp)
    left, top = frame.to_out(*kept.to_l0(0, 0))
    stride_px = kept.l0_side / frame.scale / _DRAWN_PER_SIDE
    grid = MapGrid(left + stride_px / 2, top + stride_px / 2, stride_px)
    drawn = kept.cancer.repeat(_DRAWN_PER_SIDE, axis=0).repeat(_DRAWN_PER_SIDE, axis=1)
    words = (
        "The map is the probability of cancer that the patch network gives, patch by patch; places "
        "without tissue count as 0."
    )
    return SlideMap(drawn, 1.0, _VIEW, grid, _LEVELS, "probability of cancer", words)


def probability_maps(
    task: PatchTask, model: nn.Module, split: Split, run_dir: Path, console: Console
) -> Iterator[tuple[Slide, ProbabilityMap]]:
    """Yield every slide of `split` that can be read with its map, kept in the run's folder maps.

    Patches lie on a grid without overlap; those without tissue are background, unseen.
    """
    slides, plans = _plans(task, task.slides.split(split), split, console)
    chosen = task.config.dataset
    patches = GridDataset(slides, plans, task.labels, task.config.res, mpp=chosen.mpp)
    maps = [empty_map(p.grid.n_rows, p.grid.n_columns, p.grid.l0_side) for p in plans]
    (run_dir / MAPS).mkdir(exist_ok=True)
    n_yielded = 0
    for n_done in _fill(task, model, patches, maps, split, console):
        while n_yielded < len(slides) and patches.ends[n_yielded] <= n_done:
            slide, values = slides[n_yielded], maps[n_yielded]
            if slide not in task.skipped:
                write_map(map_path(run_dir, slide), values)
                yield slide, values
            n_yielded += 1


def _plans(
    task: PatchTask, slides: Sequence[Slide], split: Split, console: Console
) -> tuple[list[Slide], list[GridPlan]]:
    """Return the slides of `split` that can be read, and the plan of each."""
    chosen = task.config.dataset
    plan = partial(plan_slide, res=task.config.res, mpp=chosen.mpp)
    readable: list[Slide] = []
    plans: list[GridPlan] = []
    asked = [slide for slide in slides if slide not in task.skipped]
    answers = map_isolated(plan, asked, workers=max(_N_READERS, chosen.workers), limits=task.limits)
    with console.task(f"finding tissue of {split}", len(asked)) as bar:
        for done, (slide, answer) in enumerate(zip(asked, answers, strict=True), 1):
            if isinstance(answer, DataError):
                task.skipped.add(slide, 0, answer)
            else:
                readable.append(slide)
                plans.append(answer)
            bar.update(done)
    return readable, plans


def _fill(
    task: PatchTask,
    model: nn.Module,
    patches: GridDataset,
    maps: list[ProbabilityMap],
    split: Split,
    console: Console,
) -> Iterator[int]:
    """Fill in `maps` batch by batch; yield the number of patches that are done, 0 at first."""
    config = task.config
    device = next(model.parameters()).device
    loader = make_loader(
        patches,
        config.batch_size,
        shuffle=False,
        workers=config.dataset.workers,
        limits=task.limits,
        skipped=task.skipped,
    )
    was_training = model.training
    model.eval()
    n_done = 0
    yield n_done
    with console.task(f"patches of {split}", len(patches)) as bar:
        for n_batches, batch in enumerate(loader, 1):
            if batch["id"]:
                _fill_in(task, model, patches, maps, batch, device)
            n_done = min(n_batches * config.batch_size, len(patches))
            bar.update(n_done)
            yield n_done
    model.train(was_training)


def _fill_in(
    task: PatchTask,
    model: nn.Module,
    patches: GridDataset,
    maps: list[ProbabilityMap],
    batch: Batch,
    device: torch.device,
) -> None:
    precision = task.config.precision
    # Entered anew for each batch: modes must not stay on while the caller works.
    with torch.inference_mode(), autocast(device, precision):
        outputs = model(task.inputs(batch, device, input_dtype(precision)))
        probs = outputs.float().softmax(dim=1).cpu().numpy()
    for position, values in zip(batch["index"].tolist(), probs, strict=True):
        at, row, column = patches.place(position)
        maps[at].probs[:, row, column] = values
        maps[at].tissue[row, column] = True


def _log_loss(rows: list[Row]) -> float:
    if not rows:
        return math.nan
    labels, probs = (np.array([row[key] for row in rows], float) for key in ("label", "prob"))
    of_truth = np.where(labels == 1, probs, 1 - probs)
    return float(-np.log(np.clip(of_truth, np.finfo(float).tiny, 1)).mean())


def _patch_task(task: Task) -> PatchTask:
    if isinstance(task, PatchTask):
        return task
    patches = PatchTask(task.config, cast(Manifest[Slide], task.manifest))
    patches.skipped = task.skipped
    return patches
