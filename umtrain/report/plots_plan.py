"""Pictures of predictions: time and memory against size, a line for each memory strategy.

Lines are predictions. Measured figures, where there are any, are points, never joined to a line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from umtrain.report.canvas import drawing

_COLOURS = {
    "vanilla": "#4d5661",
    "checkpoint": "#3b8a5a",
    "vdnn": "#b59a2a",
    "lms": "#d1702a",
    "um": "#b0485e",
    "um_group": "#c98aa0",
    "um_group_prefetch": "#7a5aa6",
    "stream": "#2f6f9f",
    "placement": "#8a6d4f",
}
_OTHER_COLOUR = "#6d747d"
_PANELS = (
    ("step_s", 1.0, "step, s"),
    ("device_peak_bytes", 2**30, "peak device memory, GiB"),
)
_LEGEND_INCHES = 0.9

Row = dict[str, Any]


def plan_plot(
    path: Path,
    rows: Sequence[Row],
    title: str,
    measured: Sequence[Row] = (),
    axis: str = "res",
) -> Path:
    """Draw `rows`, predictions with `strategy` and `axis`, and `measured` ones as points.

    What does not fit is crossed. Returns `path`.
    """
    with drawing(path, (9.2, 4.2 + _LEGEND_INCHES)) as canvas:
        panels = canvas.subplots(1, len(_PANELS), squeeze=False)[0]
        for axes, (key, scale, label) in zip(panels, _PANELS, strict=True):
            for strategy in dict.fromkeys(row["strategy"] for row in rows):
                _draw_line(axes, [r for r in rows if r["strategy"] == strategy], key, scale, axis)
            for row in measured:
                if row.get(key) is not None:
                    _draw_point(axes, row, key, scale, axis)
            _dress(axes, sorted({row[axis] for row in rows}), label, axis)
        lacks_room = any(not row["fits"] for row in rows)
        _legend(canvas, panels[0], has_points=bool(measured), has_crosses=lacks_room)
        canvas.suptitle(title, fontsize=11)
    return path


def _draw_line(axes: Axes, rows: Sequence[Row], key: str, scale: float, axis: str) -> None:
    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[axis])
    if not known:
        return
    name = known[0]["strategy"]
    colour = _COLOURS.get(name, _OTHER_COLOUR)
    xs = [row[axis] for row in known]
    ys = [row[key] / scale for row in known]
    dash = "_" if len(known) == 1 else ""
    axes.plot(xs, ys, marker=dash, markersize=14, color=colour, linewidth=1.4, label=name)
    lost = [row for row in known if not row["fits"]]
    axes.plot(
        [row[axis] for row in lost],
        [row[key] / scale for row in lost],
        "x",
        color=colour,
        markersize=7,
        markeredgewidth=1.6,
    )


def _draw_point(axes: Axes, row: Row, key: str, scale: float, axis: str) -> None:
    colour = _COLOURS.get(row["strategy"], _OTHER_COLOUR)
    axes.plot(row[axis], row[key] / scale, "o", color=colour, markersize=5)


def _dress(axes: Axes, ticks: Sequence[int], label: str, axis: str) -> None:
    axes.set(xlabel=axis, ylabel=label, yscale="log", ylim=(None, None))
    if len(ticks) > 1:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(canvas: Figure, axes: Axes, *, has_points: bool, has_crosses: bool) -> None:
    if has_crosses:
        axes.plot([], [], "x", color=_OTHER_COLOUR, label="does not fit")
    if has_points:
        axes.plot([], [], "o", color=_OTHER_COLOUR, label="measured")
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)


def limits_plot(path: Path, rows: Sequence[Row], title: str, axis: str) -> Path:
    """Draw the largest value of each strategy as a bar; returns `path`."""
    with drawing(path, (7.2, 0.9 + 0.42 * len(rows))) as canvas:
        axes = canvas.subplots()
        names = [row["strategy"] for row in rows]
        values = [row["largest"] or 0 for row in rows]
        bars = axes.barh(names, values, color=[_COLOURS.get(n, _OTHER_COLOUR) for n in names])
        axes.bar_label(bars, [str(row["largest"] or "does not fit") for row in rows], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel=f"largest {axis}")
        canvas.suptitle(title, fontsize=11)
    return path
