"""Pictures of a run or a sweep, drawn from its record and tables."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from umtrain.files import write_atomic
from umtrain.report.record import Record, figure

BLUE, ORANGE, GREY = "#2f6f9f", "#d1702a", "#8a8f98"
_QUALITY = {"wsi": ("test.auc", "test AUC"), "spine": ("test.mae_mm", "SVA MAE, mm")}
_INTERVALS = {"test.auc": "test.auc_ci", "test.mae_mm": "test.mae_ci_mm"}
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A PNG of the run directory with the words that go with it."""

    path: Path
    title: str


def run_plots(run_dir: Path, record: Record, predictions: list[dict[str, Any]]) -> list[Picture]:
    """Draw the training curve and the test (else validation) predictions of one run."""
    pictures = [_training_curve(run_dir, record)] if (run_dir / "steps.csv").exists() else []
    for split in ("test", "val"):
        rows = [row for row in predictions if row["split"] == split]
        if rows:
            pictures.append(_predictions_plot(run_dir, record, rows, split))
            break
    return pictures


def sweep_plot(path: Path, records: list[Record], axis: str) -> Picture:
    """Draw quality, throughput and peak memory against `axis`, a line per memory strategy."""
    done = [record for record in records if record["status"] == "ok"]
    panels = [_QUALITY[dataset] for dataset in dict.fromkeys(r["dataset"] for r in records)]
    panels += [
        ("throughput.images_per_s.mean", "training images/s"),
        ("memory_use.rss_peak_bytes", "peak process memory, GiB"),
    ]
    with mpl.rc_context(_STYLE):
        canvas = Figure(figsize=(3.7 * len(panels), 3.4), layout="constrained")
        for axes, (key, label) in zip(canvas.subplots(1, len(panels)), panels, strict=True):
            _sweep_panel(axes, done, axis, key)
            axes.set(xlabel=axis, ylabel=label)
        _save(canvas, path)
    return Picture(path, f"Quality, throughput and memory against {axis}")


def _sweep_panel(axes: Axes, records: list[Record], axis: str, key: str) -> None:
    lines: dict[str, list[Record]] = {}
    for record in records:
        others = (f"{k}={v}" for k, v in record["axes"].items() if k != axis)
        if figure(record, key) is not None:
            lines.setdefault(", ".join(others), []).append(record)
    place = _places([record["axes"][axis] for record in records])
    scale = 2**30 if key.endswith("bytes") else 1
    for name, line in lines.items():
        points = sorted((place[r["axes"][axis]], figure(r, key) / scale) for r in line)
        axes.plot(*zip(*points, strict=True), marker="o", label=name or None)
        if len(lines) == 1 and key in _INTERVALS:
            _interval(axes, line, place, axis, _INTERVALS[key])
    if any(text != f"{x:g}" for text, x in place.items()):
        axes.set_xticks(list(place.values()), list(place))
    if key.startswith("throughput") and lines:
        axes.set_yscale("log")
    if any(lines):
        axes.legend()


def _interval(
    axes: Axes, records: list[Record], place: dict[str, float], axis: str, key: str
) -> None:
    known = sorted((place[r["axes"][axis]], *figure(r, key)) for r in records if figure(r, key))
    if known:
        x, low, high = zip(*known, strict=True)
        axes.fill_between(x, low, high, alpha=0.15, color=BLUE, label="95% CI")
        axes.legend()


def _places(values: list[str]) -> dict[str, float]:
    """Return where each value of an axis is drawn: at its number, or in order if any is none."""
    try:
        return {text: float(text) for text in values}
    except ValueError:
        return {text: float(place) for place, text in enumerate(dict.fromkeys(values))}


def _training_curve(run_dir: Path, record: Record) -> Picture:
    with (run_dir / "steps.csv").open(newline="", encoding="utf-8") as stream:
        steps = list(csv.DictReader(stream))
    validations = figure(record, "train.validations") or []
    path = run_dir / "training.png"
    with mpl.rc_context(_STYLE):
        canvas = Figure(figsize=(6, 3.4), layout="constrained")
        axes = canvas.subplots()
        losses = [float(step["loss"]) for step in steps]
        axes.plot(range(1, len(losses) + 1), losses, color=GREY, alpha=0.35, linewidth=0.8)
        axes.plot(*_smooth(losses), color=BLUE, label="training loss, smoothed")
        ends = _epoch_ends(steps)
        known = [(ends[v["epoch"]], v["loss"]) for v in validations if v["loss"] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=ORANGE, label="validation loss")
        axes.set(xlabel="step", ylabel="loss", title="Training")
        axes.legend()
        _save(canvas, path)
    return Picture(path, "Training: loss of each step, and of the validation split")


def _smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    window = max(1, len(losses) // 20)
    ends = range(window, len(losses) + 1)
    return list(ends), [sum(losses[end - window : end]) / window for end in ends]


def _epoch_ends(steps: list[dict[str, str]]) -> dict[int, int]:
    return {int(step["epoch"]): int(step["step"]) for step in steps}


def _predictions_plot(
    run_dir: Path, record: Record, rows: list[dict[str, Any]], split: str
) -> Picture:
    with mpl.rc_context(_STYLE):
        canvas = Figure(figsize=(8.5, 3.6), layout="constrained")
        left, right = canvas.subplots(1, 2)
        if record["dataset"] == "spine":
            path, title = run_dir / f"sva_{split}.png", f"SVA of the {split} split"
            _agreement(left, right, rows)
        else:
            path, title = run_dir / f"roc_{split}.png", f"Classification of the {split} split"
            _roc(left, rows, figure(record, f"{split}.auc"))
            _probabilities(right, rows)
        _save(canvas, path)
    return Picture(path, title)


def _roc(axes: Axes, rows: list[dict[str, Any]], auc: float | None) -> None:
    labels = [int(row["label"]) for row in rows]
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    if auc is None:
        axes.text(0.5, 0.5, "one class only: no ROC curve", ha="center")
    else:
        false_positive, true_positive, _ = roc_curve(labels, [float(row["prob"]) for row in rows])
        axes.plot(false_positive, true_positive, color=BLUE, label=f"AUC {auc:.3f}")
        axes.legend(loc="lower right")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", title="ROC curve", aspect="equal")


def _probabilities(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for label, name, colour in ((0, "negative", BLUE), (1, "positive", ORANGE)):
        values = sorted(float(row["prob"]) for row in rows if int(row["label"]) == label)
        offsets = [label + 0.3 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
        axes.scatter(offsets, values, color=colour, alpha=0.75, label=name)
    axes.axhline(0.5, color=GREY, linestyle=":")
    axes.set(
        xticks=[0, 1],
        xticklabels=["negative", "positive"],
        ylim=(-0.02, 1.02),
        ylabel="probability of positive",
        title="Predictions",
    )


def _agreement(left: Axes, right: Axes, rows: list[dict[str, Any]]) -> None:
    true = [float(row["sva_true_mm"]) for row in rows]
    predicted = [float(row["sva_pred_mm"]) for row in rows]
    ends = [min(true + predicted), max(true + predicted)]
    left.plot(ends, ends, color=GREY, linestyle=":")
    left.scatter(true, predicted, color=BLUE, alpha=0.8)
    left.set(xlabel="true SVA, mm", ylabel="predicted SVA, mm", title="Agreement")
    errors = [abs(p - t) for p, t in zip(predicted, true, strict=True)]
    right.hist(errors, bins=min(20, max(5, len(errors) // 2)), color=BLUE, alpha=0.85)
    right.set(xlabel="absolute error of SVA, mm", ylabel="images", title="Errors")


def _save(canvas: Figure, path: Path) -> None:
    write_atomic(path, lambda stream: canvas.savefig(stream, format="png", dpi=130))
