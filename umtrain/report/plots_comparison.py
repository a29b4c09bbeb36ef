"""Pictures of several runs on the images that they share."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from sklearn.metrics import precision_recall_curve, roc_curve

from umtrain.report.canvas import BLUE, COLOURS, GREY, ORANGE, Absent, Panel, Picture, drawing
from umtrain.report.plots_keypoints import cumulative
from umtrain.report.wording import estimate, number

Comparison = dict[str, Any]
_STYLES = ("-", "--", "-.", ":")


def comparison_plots(folder: Path, comparison: Comparison) -> list[Panel]:
    """Draw all runs of `comparison` in one figure each way, and each run against the first."""
    if comparison["dataset"] == "spine":
        return [_errors(folder, comparison), *_error_pairs(folder, comparison)]
    return [
        _curves(folder, comparison, _roc_curve, "ROC curves", "roc.png"),
        _curves(folder, comparison, _pr_curve, "Precision and recall", "pr.png"),
        *_probability_pairs(folder, comparison),
    ]


def _look(number_: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number_ % len(COLOURS)],
        "linestyle": _STYLES[number_ // len(COLOURS) % len(_STYLES)],
    }


def _curves(folder: Path, comparison: Comparison, draw: Any, title: str, name: str) -> Panel:
    labels = [image["label"] for image in comparison["images"]]
    if len(set(labels)) < 2:
        return Absent(title, "the images that the runs share are all of one class")
    path = folder / name
    with drawing(path) as canvas:
        axes = canvas.subplots()
        for i, run in enumerate(comparison["runs"]):
            probs = [image["probs"][i] for image in comparison["images"]]
            draw(axes, labels, probs, run, _look(i))
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        if draw is _roc_curve:
            axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
            axes.legend(loc="lower right", title="AUC")
        else:
            axes.axhline(sum(labels) / len(labels), color=GREY, linestyle=":", linewidth=1.2)
            axes.legend(loc="lower left", title="average precision")
    higher = "nearer the top left corner" if draw is _roc_curve else "nearer the top right corner"
    return Picture(
        path,
        title,
        f"{title} of {len(comparison['runs'])} runs",
        f"All runs on the same {len(labels)} slides; {higher} is better, dotted is chance. Curves "
        "that cross or lie close are told apart by the paired test below, not by eye.",
    )


def _roc_curve(
    axes: Axes, labels: list[int], probs: list[float], run: dict[str, Any], look: dict[str, Any]
) -> None:
    false_positive, true_positive, _ = roc_curve(labels, probs)
    shared = run["shared"]
    words = f"{run['run']}  {estimate(shared.get('auc'), shared.get('auc_ci'))}"
    axes.plot(false_positive, true_positive, label=words, **look)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")


def _pr_curve(
    axes: Axes, labels: list[int], probs: list[float], run: dict[str, Any], look: dict[str, Any]
) -> None:
    precision, recall, _ = precision_recall_curve(labels, probs)
    words = f"{run['run']}  {number(run['shared'].get('average_precision'))}"
    axes.plot(recall, precision, label=words, **look)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision")


def _probability_pairs(folder: Path, comparison: Comparison) -> list[Panel]:
    images, runs = comparison["images"], comparison["runs"]
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
                own = [image["probs"] for image in images if image["label"] == label]
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
                f"{run['run']} against {runs[0]['run']}, slide by slide",
                f"Probability of each slide by {run['run']} against that by {runs[0]['run']}",
                "Dots far from the dotted line are slides on which the two disagree. A triangle "
                f"above the line, or a circle below it, is a slide that {run['run']} sees better.",
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
