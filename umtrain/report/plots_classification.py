"""Pictures of how well images were classified: curves, probabilities, calibration, confusion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from sklearn.metrics import precision_recall_curve, roc_curve

from umtrain.report.canvas import BLUE, GREY, ORANGE, Absent, Panel, Picture, drawing
from umtrain.report.reasons import why_absent
from umtrain.report.record import Record, figure
from umtrain.report.wording import (
    SPLIT_NAMES,
    estimate,
    image_name,
    images,
    interval,
    number,
    percent,
)

Row = dict[str, Any]
_INK = "#1d2530"
_N_BINS = 20


def classification_plots(run_dir: Path, record: Record, rows: list[Row], split: str) -> list[Panel]:
    """Draw what the record and the predictions of `split` have; say what is missing, and why."""
    section = record[split] or {}
    positive = str(record["data"].get("positive") or "")
    dataset = str(record["dataset"])
    return [
        _roc(run_dir, section, rows, split),
        _precision_recall(run_dir, section, rows, split, f"{image_name(dataset)}s"),
        _probabilities(run_dir, section, rows, split, positive, dataset),
        _calibration(run_dir, section, rows, split, f"{image_name(dataset)}s"),
        _confusion(run_dir, section, split, positive),
    ]


def labels_and_probs(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Return the labels and the probabilities of rows of predictions.csv."""
    return [int(row["label"]) for row in rows], [float(row["prob"]) for row in rows]


def _roc(run_dir: Path, section: dict[str, Any], rows: list[Row], split: str) -> Panel:
    title = f"ROC curve, {SPLIT_NAMES[split]}"
    if section.get("auc") is None:
        return Absent(title, why_absent(section, "auc", split))
    curve = figure(section, "curves.roc")
    if curve is None:
        false_positive, true_positive, _ = roc_curve(*labels_and_probs(rows))
        curve = {"fpr": false_positive, "tpr": true_positive}
    path = run_dir / f"roc_{split}.png"
    with drawing(path) as canvas:
        axes = canvas.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
        _band(axes, curve, "fpr", BLUE)
        axes.plot(curve["fpr"], curve["tpr"], color=BLUE, label="model")
        if section.get("sensitivity") is not None and section.get("specificity") is not None:
            point = (1 - section["specificity"], section["sensitivity"])
            threshold = f"threshold {number(section.get('threshold'))}"
            axes.plot(*point, "o", color=ORANGE, markersize=8, label=threshold)
        axes.legend(loc="lower right")
        axes.set(xlabel="1 − specificity", ylabel="sensitivity", **_square())
    auc = estimate(section["auc"], section.get("auc_ci"))
    return Picture(
        path,
        title,
        f"Sensitivity against 1 minus specificity; AUC {auc}",
        f"AUC {auc}. The nearer the curve comes to the top left corner, the better the two "
        f"classes are told apart. {_band_words(curve, section, split)}",
    )


def _precision_recall(
    run_dir: Path, section: dict[str, Any], rows: list[Row], split: str, noun: str
) -> Panel:
    title = f"Precision and recall, {SPLIT_NAMES[split]}"
    if section.get("auc") is None:
        return Absent(title, why_absent(section, "auc", split))
    labels, probs = labels_and_probs(rows)
    curve = figure(section, "curves.pr")
    if curve is None:
        precision, recall, _ = precision_recall_curve(labels, probs)
        curve = {"recall": recall, "precision": precision, "prevalence": sum(labels) / len(labels)}
    path = run_dir / f"pr_{split}.png"
    with drawing(path) as canvas:
        axes = canvas.subplots()
        axes.axhline(curve["prevalence"], color=GREY, linestyle=":", label="chance")
        _band(axes, curve, "recall", BLUE)
        axes.plot(curve["recall"], curve["precision"], color=BLUE, label="model")
        axes.legend(loc="lower left")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", **_square())
    average = estimate(section.get("average_precision"), section.get("average_precision_ci"))
    return Picture(
        path,
        title,
        f"Precision against recall; average precision {average}",
        f"Average precision {average}. Of the {noun} that the model calls positive, precision is "
        f"the share that are; chance is the share of positive {noun}, "
        f"{number(curve['prevalence'])}. {_band_words(curve, section, split)}",
    )


def _band(axes: Axes, curve: dict[str, Any], x: str, colour: str) -> None:
    if curve.get("low") is not None and curve.get("high") is not None:
        axes.fill_between(curve[x], curve["low"], curve["high"], color=colour, alpha=0.15, lw=0)


def _band_words(curve: dict[str, Any], section: dict[str, Any], split: str) -> str:
    if curve.get("low") is not None:
        return "The band is the 95% interval at each point."
    why = curve.get("low_reason") or why_absent(section, "curves", split)
    return f"No band: {why}."


def _square() -> dict[str, Any]:
    return {"xlim": (-0.02, 1.02), "ylim": (-0.02, 1.02), "aspect": "equal"}


def _probabilities(
    run_dir: Path,
    section: dict[str, Any],
    rows: list[Row],
    split: str,
    positive: str,
    dataset: str,
) -> Panel:
    path = run_dir / f"probabilities_{split}.png"
    threshold = section.get("threshold")
    names = _class_names(positive)
    labels, probs = labels_and_probs(rows)
    with drawing(path) as canvas:
        axes = canvas.subplots()
        for label, colour, marker in ((0, BLUE, "o"), (1, ORANGE, "^")):
            values = sorted(p for p, own in zip(probs, labels, strict=True) if own == label)
            # The golden ratio spreads neighbours in value far apart in the column.
            offsets = [label + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
            axes.scatter(offsets, values, color=colour, marker=marker, alpha=0.7, s=28)
        if threshold is not None:
            axes.axhline(threshold, color=_INK, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"threshold {number(threshold)}", (1.48, threshold), ha="right", va="bottom"
            )
        axes.set(
            xticks=[0, 1], xlim=(-0.5, 1.5), ylim=(-0.03, 1.03), ylabel="probability of positive"
        )
        counts = [f"{names[i]}\n{images(dataset, labels.count(i))}" for i in (0, 1)]
        axes.set_xticklabels(counts)
        axes.grid(axis="x", visible=False)
    line = (
        "Circles above the line are false positives, triangles below it false negatives."
        if threshold is not None
        else f"No threshold: {why_absent(section, 'threshold', split)}."
    )
    return Picture(
        path,
        f"Probability of each {image_name(dataset)}, {SPLIT_NAMES[split]}",
        f"Predicted probability of {images(dataset, len(rows))}, by true class",
        f"A good model has the left column low and the right one high. {line}",
    )


def _calibration(
    run_dir: Path, section: dict[str, Any], rows: list[Row], split: str, noun: str
) -> Panel:
    title = f"Calibration, {SPLIT_NAMES[split]}"
    bins = section.get("calibration")
    if not bins:
        return Absent(title, why_absent(section, "calibration", split))
    path = run_dir / f"calibration_{split}.png"
    with drawing(path) as canvas:
        top, bottom = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _reliability(top, bins)
        _histogram(bottom, rows, noun)
    brier = section.get("brier")
    score = f" Brier score {number(brier, 3)} (0 is perfect)." if brier is not None else ""
    return Picture(
        path,
        title,
        f"Share of positive {noun} against predicted probability in {len(bins)} groups",
        f"Points on the dotted line: of the {noun} given a probability of 0.8, 80% are positive. "
        f"Below it the model is too sure of positives. Bars are 95% intervals, numbers count the "
        f"{noun} of each point.{score} Below: how often each probability was given.",
    )


def _reliability(axes: Axes, bins: list[dict[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    for one in bins:
        x, y = one["prob_mean"], one["share_positive"]
        if one.get("ci"):
            axes.plot([x, x], one["ci"], color=BLUE, linewidth=1.2)
        axes.plot(x, y, "o", color=BLUE, markersize=6)
        axes.annotate(
            str(one["n"]), (x, y), xytext=(5, 2), textcoords="offset points", fontsize=9, color=_INK
        )
    axes.set(ylabel="share positive", xlim=(-0.02, 1.05), ylim=(-0.04, 1.06))


def _histogram(axes: Axes, rows: list[Row], noun: str) -> None:
    labels, probs = labels_and_probs(rows)
    parts = [[p for p, own in zip(probs, labels, strict=True) if own == i] for i in (0, 1)]
    edges = [i / _N_BINS for i in range(_N_BINS + 1)]
    axes.hist(parts, bins=edges, stacked=True, color=[BLUE, ORANGE], label=["negative", "positive"])
    axes.legend(fontsize=8, ncols=2, loc="upper center", borderpad=0.1)
    low, high = axes.get_ylim()
    axes.set(xlabel="predicted probability of positive", ylabel=noun, ylim=(low, high * 1.35))


def _confusion(run_dir: Path, section: dict[str, Any], split: str, positive: str) -> Panel:
    title = f"Confusion at the threshold, {SPLIT_NAMES[split]}"
    counts = section.get("confusion")
    if not counts:
        return Absent(title, why_absent(section, "confusion", split))
    path = run_dir / f"confusion_{split}.png"
    cells = ((counts["tp"], counts["fn"]), (counts["fp"], counts["tn"]))
    words = (("true positive", "false negative"), ("false positive", "true negative"))
    negative_name, positive_name = _class_names(positive)
    with drawing(path) as canvas:
        axes = canvas.subplots()
        shares = [[n / max(1, sum(row)) for n in row] for row in cells]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.6)
        for i, row in enumerate(cells):
            for j, n in enumerate(row):
                told = f"{n}\n{words[i][j]}\n{percent(shares[i][j])} of the row"
                axes.text(j, i, told, ha="center", va="center", color=_INK)
        axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="model says", ylabel="truth")
        axes.set_xticklabels(["positive", "negative"])
        axes.set_yticklabels([positive_name, negative_name], rotation=90, va="center")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    sensitivity, specificity = (
        f"{name} {number(section.get(name))} ({interval(section.get(f'{name}_ci'))})"
        for name in ("sensitivity", "specificity")
    )
    chosen = section.get("threshold_from")
    return Picture(
        path,
        title,
        f"{counts['tp']} true positives, {counts['fn']} false negatives, "
        f"{counts['fp']} false positives, {counts['tn']} true negatives",
        f"At the threshold {number(section.get('threshold'))}"
        f"{f' ({chosen})' if chosen else ''}: {sensitivity}, {specificity}.",
    )


def _class_names(positive: str) -> tuple[str, str]:
    return "negative", f"positive ({positive})" if positive else "positive"
