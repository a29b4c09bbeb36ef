"""Pictures of several runs on the images that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from umtrain.report.canvas import BLUE, COLOURS, GREY, ORANGE, Absent, Panel, Picture, drawing
from umtrain.report.plots_keypoints import cumulative
from umtrain.report.wording import estimate, image_name, images

Comparison = dict[str, Any]
Floats = NDArray[np.float64]
_STYLES = ("-", "--", "-.", ":")


def comparison_plots(folder: Path, comparison: Comparison) -> list[Panel]:
    """Draw all runs of `comparison` in one figure each way, and each run against the first."""
    if comparison["dataset"] == "spine":
        return [_errors(folder, comparison), *_error_pairs(folder, comparison)]
    return [
        _curves(folder, comparison, _ROC, "auc"),
        _curves(folder, comparison, _PR, "average_precision"),
        *_probability_pairs(folder, comparison),
    ]


@dataclass(frozen=True)
class _Curve:
    """A kind of curve: how to have its x and y, and the words and places around it."""

    title: str
    file: str
    points: Callable[[list[int], list[float]], tuple[Floats, Floats]]
    labels: tuple[str, str]
    legend: tuple[str, str]
    best_corner: str


def _roc_points(labels: list[int], probs: list[float]) -> tuple[Floats, Floats]:
    false_positive, true_positive, _ = roc_curve(labels, probs)
    return false_positive, true_positive


def _pr_points(labels: list[int], probs: list[float]) -> tuple[Floats, Floats]:
    precision, recall, _ = precision_recall_curve(labels, probs)
    return recall, precision


_ROC = _Curve(
    "ROC curves",
    "roc.png",
    _roc_points,
    ("1 − specificity", "sensitivity"),
    ("AUC", "lower right"),
    "top left",
)
_PR = _Curve(
    "Precision and recall",
    "pr.png",
    _pr_points,
    ("recall (sensitivity)", "precision"),
    ("average precision", "lower left"),
    "top right",
)


def _look(number_: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number_ % len(COLOURS)],
        "linestyle": _STYLES[number_ // len(COLOURS) % len(_STYLES)],
    }


def _curves(folder: Path, comparison: Comparison, curve: _Curve, area: str) -> Panel:
    labels = [image["label"] for image in comparison["images"]]
    if len(set(labels)) < 2:
        return Absent(curve.title, "the images that the runs share are all of one class")
    prevalence = sum(labels) / len(labels)
    counted = images(comparison["dataset"], len(labels))
    path = folder / curve.file
    with drawing(path) as canvas:
        axes = canvas.subplots()
        for i, run in enumerate(comparison["runs"]):
            shared = run["shared"]
            words = f"{run['run']}  {estimate(shared.get(area), shared.get(f'{area}_ci'))}"
            probs = [image["probs"][i] for image in comparison["images"]]
            axes.plot(*curve.points(labels, probs), label=words, **_look(i))
        chance = [0, 1] if curve is _ROC else [prevalence, prevalence]
        axes.plot([0, 1], chance, color=GREY, linestyle=":", linewidth=1.2)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set(xlabel=curve.labels[0], ylabel=curve.labels[1])
        axes.legend(title=curve.legend[0], loc=curve.legend[1])
    return Picture(
        path,
        curve.title,
        f"{curve.title} of {len(comparison['runs'])} runs",
        f"All runs on the same {counted}; nearer the {curve.best_corner} corner is "
        "better, dotted is chance. Curves that cross or lie close are told apart by the paired "
        "test below, not by eye.",
    )


def _probability_pairs(folder: Path, comparison: Comparison) -> list[Panel]:
    shared, runs = comparison["images"], comparison["runs"]
    noun = image_name(comparison["dataset"])
    panels: list[Panel] = []
    for i, run in enumerate(runs[1:], 1):
        path = folder / f"pairs_{run['run']}.png"
        with drawing(path) as canvas:
            axes = canvas.subplots()
            axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
            for label, name, colour, marker in (
                (0, "negative", BLUE, "o"),
                (1, "positive", ORANGE, "^"),
            ):
                own = [image["probs"] for image in shared if image["label"] == label]
                x, y = [probs[0] for probs in own], [probs[i] for probs in own]
                axes.scatter(x, y, color=colour, marker=marker, alpha=0.7, s=28, label=name)
            axes.legend()
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
            axes.set(
                xlabel=f"probability by {runs[0]['run']}", ylabel=f"probability by {run['run']}"
            )
        panels.append(
            Picture(
                path,
                f"{run['run']} against {runs[0]['run']}, {noun} by {noun}",
                f"Probability of each {noun} by {run['run']} against that by {runs[0]['run']}",
                f"Dots far from the dotted line are {noun}s on which the two disagree. A triangle "
                f"above the line, or a circle below it, is a {noun} that {run['run']} sees better.",
            )
        )
    return panels


def _errors(folder: Path, comparison: Comparison) -> Panel:
    path = folder / "errors.png"
    with drawing(path) as canvas:
        axes = canvas.subplots()
        for i, run in enumerate(comparison["runs"]):
            shared = run["shared"]
            words = f"{run['run']}  {estimate(shared.get('mae_mm'), shared.get('mae_ci_mm'))}"
            cumulative(axes, _absolute_errors_mm(comparison, i), label=words, **_look(i))
        axes.set(xlabel="absolute error of SVA, mm", ylabel="share of radiographs")
        axes.set(xlim=(0, None), ylim=(0, 1.02))
        axes.legend(loc="lower right", title="mean, mm")
    return Picture(
        path,
        "How many are within x mm",
        f"Share of radiographs against absolute error of SVA, {len(comparison['runs'])} runs",
        f"All runs on the same {len(comparison['images'])} radiographs; the steeper the better.",
    )


def _error_pairs(folder: Path, comparison: Comparison) -> list[Panel]:
    runs = comparison["runs"]
    first = _absolute_errors_mm(comparison, 0)
    panels: list[Panel] = []
    for i, run in enumerate(runs[1:], 1):
        path = folder / f"pairs_{run['run']}.png"
        own = _absolute_errors_mm(comparison, i)
        end = 1.05 * max(*first, *own, 0.1)
        with drawing(path) as canvas:
            axes = canvas.subplots()
            axes.plot([0, end], [0, end], color=GREY, linestyle=":", linewidth=1.2)
            axes.scatter(first, own, color=BLUE, alpha=0.7, s=28)
            axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
            axes.set(xlabel=f"error of {runs[0]['run']}, mm", ylabel=f"error of {run['run']}, mm")
        panels.append(
            Picture(
                path,
                f"{run['run']} against {runs[0]['run']}, film by film",
                f"Error of each radiograph by {run['run']} against that by {runs[0]['run']}",
                f"Dots below the dotted line are radiographs that {run['run']} measures better.",
            )
        )
    return panels


def _absolute_errors_mm(comparison: Comparison, number_: int) -> list[float]:
    return [
        abs(image["sva_pred_mm"][number_] - image["sva_true_mm"]) for image in comparison["images"]
    ]
