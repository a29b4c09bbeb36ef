"""Pictures of how well keypoints measure a spine: agreement of SVA, errors in millimetres."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from umtrain.report.canvas import BLUE, COLOURS, GREY, ORANGE, Absent, Panel, Picture, drawing
from umtrain.report.reasons import why_absent
from umtrain.report.record import Record
from umtrain.report.wording import SPLIT_NAMES, estimate, interval, number, percent

Row = dict[str, Any]
_WITHIN_MM = ("2", "2.5", "3", "4", "5")
_POINTS = {"c7": "C7", "s1": "S1"}
_SPACINGS = ("mm_per_px", "row_mm_per_px")  # of x and of y


def keypoint_plots(run_dir: Path, record: Record, rows: list[Row], split: str) -> list[Panel]:
    """Draw what the record and the predictions of `split` have; say what is missing, and why."""
    section = record[split] or {}
    return [
        _agreement(run_dir, section, rows, split),
        _bland_altman(run_dir, section, rows, split),
        _cumulative(run_dir, section, rows, split),
    ]


def sva_pairs_mm(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Return true and predicted SVA of rows of predictions.csv."""
    return [float(row["sva_true_mm"]) for row in rows], [float(row["sva_pred_mm"]) for row in rows]


def radial_errors_mm(rows: list[Row], point: str) -> list[float] | None:
    """Return each row's distance of `point` ("c7" or "s1") from the truth; None without spacing."""
    if not all(row.get(key) for row in rows for key in _SPACINGS):
        return None
    return [
        math.hypot(*(_offset_mm(row, point, axis, _SPACINGS[i]) for i, axis in enumerate("xy")))
        for row in rows
    ]


def _offset_mm(row: Row, point: str, axis: str, spacing: str) -> float:
    offset_px = float(row[f"{point}_{axis}_pred"]) - float(row[f"{point}_{axis}_true"])
    return offset_px * float(row[spacing])


def cumulative(axes: Axes, errors_mm: list[float], **look: Any) -> None:
    """Draw the share of images with an error of at most x, from 0 to the largest error."""
    ordered = sorted(errors_mm)
    shares = [i / len(ordered) for i in range(len(ordered) + 1)]
    axes.step([0.0, *ordered], shares, where="post", **look)


def _agreement(run_dir: Path, section: dict[str, Any], rows: list[Row], split: str) -> Panel:
    true, predicted = sva_pairs_mm(rows)
    path = run_dir / f"sva_{split}.png"
    with drawing(path) as canvas:
        axes = canvas.subplots()
        low, high = min(true + predicted), max(true + predicted)
        margin = 0.04 * (high - low) or 1.0
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=GREY, linestyle=":", label="equal")
        axes.scatter(true, predicted, color=BLUE, alpha=0.7, s=28)
        axes.legend(loc="upper left")
        axes.set(xlabel="true SVA, mm", ylabel="predicted SVA, mm", xlim=ends, ylim=ends)
        axes.set_aspect("equal")
    icc = section.get("icc") or {}
    agreement = (
        f"{_icc_name(icc)} {estimate(icc['value'], icc.get('ci'))}."
        if icc.get("value") is not None
        else f"No ICC: {why_absent(section, 'icc', split)}."
    )
    return Picture(
        path,
        f"Predicted against true SVA, {SPLIT_NAMES[split]}",
        f"Predicted against true SVA of {len(rows)} radiographs",
        f"Each dot is a radiograph; on the dotted line prediction and truth are equal. {agreement}",
    )


def _icc_name(icc: dict[str, Any]) -> str:
    """Return "ICC(2,1)" of a kind that goes on to explain itself after a colon."""
    return str(icc.get("kind") or "ICC").partition(":")[0]


def _bland_altman(run_dir: Path, section: dict[str, Any], rows: list[Row], split: str) -> Panel:
    title = f"Bland–Altman, {SPLIT_NAMES[split]}"
    figures = section.get("bland_altman")
    if not figures or figures.get("bias_mm") is None:
        return Absent(title, why_absent(section, "bland_altman", split))
    true, predicted = sva_pairs_mm(rows)
    path = run_dir / f"bland_altman_{split}.png"
    with drawing(path) as canvas:
        axes = canvas.subplots()
        means = [(t + p) / 2 for t, p in zip(true, predicted, strict=True)]
        axes.scatter(
            means,
            [p - t for t, p in zip(true, predicted, strict=True)],
            color=BLUE,
            s=28,
            alpha=0.7,
        )
        for name, colour in (("bias", ORANGE), ("lower", GREY), ("upper", GREY)):
            _level(axes, figures, name, colour)
        axes.set(xlabel="mean of true and predicted SVA, mm", ylabel="predicted − true, mm")
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.3 * (right - left))  # room for the levels' figures
    limits = (figures["lower_mm"], figures["upper_mm"])
    known = figures["lower_mm"] is not None
    return Picture(
        path,
        title,
        f"Difference against mean of true and predicted SVA; bias {number(figures['bias_mm'])} mm",
        f"Bias {estimate(figures['bias_mm'], figures.get('bias_ci_mm'))} mm"
        + (f"; 95% of differences are expected within {interval(limits, 1)} mm" if known else "")
        + ". Bands are the 95% intervals of the three lines. A slope or a fan of dots means that "
        "the error depends on the SVA.",
    )


def _level(axes: Axes, figures: dict[str, Any], name: str, colour: str) -> None:
    value, bounds = figures.get(f"{name}_mm"), figures.get(f"{name}_ci_mm")
    if value is None:
        return
    axes.axhline(value, color=colour, linestyle="-" if name == "bias" else "--", linewidth=1.4)
    if bounds:
        axes.axhspan(*bounds, color=colour, alpha=0.12, linewidth=0)
    words = f"{'bias' if name == 'bias' else 'limit'} {number(value, 1)}"
    at_the_right = axes.get_yaxis_transform()
    axes.text(0.995, value, words, transform=at_the_right, ha="right", va="bottom")


def _cumulative(run_dir: Path, section: dict[str, Any], rows: list[Row], split: str) -> Panel:
    title = f"How many are within x mm, {SPLIT_NAMES[split]}"
    radial = {point: radial_errors_mm(rows, point) for point in _POINTS}
    if any(errors is None for errors in radial.values()):
        return Absent(title, "predictions.csv has no spacing of rows and columns for every image")
    path = run_dir / f"errors_{split}.png"
    true, predicted = sva_pairs_mm(rows)
    with drawing(path) as canvas:
        axes = canvas.subplots()
        for (point, name), colour in zip(_POINTS.items(), COLOURS, strict=False):
            cumulative(axes, radial[point] or [], color=colour, label=f"{name}, distance")
            _successes(axes, section, point, colour)
        errors = [abs(p - t) for t, p in zip(true, predicted, strict=True)]
        cumulative(axes, errors, color=GREY, linestyle="--", label="SVA, absolute error")
        axes.set(xlabel="error, mm", ylabel="share of radiographs", ylim=(0, 1.02))
        axes.set_xlim(0, _shown_mm(axes.get_xlim()[1]))
        axes.legend(loc="lower right")
    return Picture(
        path,
        title,
        "Share of radiographs against the error of C7, S1 and SVA",
        f"The steeper the better. {_success_words(section, split)}",
    )


def _shown_mm(largest_mm: float) -> float:
    """Return how far the axis goes: a stray prediction must not squeeze what matters."""
    return min(max(largest_mm, 6.0), 20.0)


def _successes(axes: Axes, section: dict[str, Any], point: str, colour: str) -> None:
    shares = (section.get("success") or {}).get(point) or {}
    known = [(float(mm), shares[mm]) for mm in _WITHIN_MM if shares.get(mm) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "o", color=colour, markersize=5)


def _success_words(section: dict[str, Any], split: str) -> str:
    success = section.get("success")
    if not success:
        return f"No success rates: {why_absent(section, 'success', split)}."
    told = [
        f"{name} {' / '.join(percent((success.get(point) or {}).get(mm)) for mm in _WITHIN_MM)}"
        for point, name in _POINTS.items()
    ]
    return f"Dots: within {' / '.join(_WITHIN_MM)} mm are {', '.join(told)}."
