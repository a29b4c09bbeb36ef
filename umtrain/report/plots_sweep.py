"""Pictures of a sweep: quality, speed and memory against one of its axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from umtrain.report.canvas import COLOURS, Picture, drawing
from umtrain.report.record import Record, figure, throughput_unit

_DODGE = 0.012  # of the axis: lines with bars at one x would hide each other
_MOST_TICKS = 8


@dataclass(frozen=True)
class _View:
    """What is drawn: the figure at `key`, with the interval or the deviation beside it."""

    name: str
    label: str
    key: str
    caption: str
    interval_key: str | None = None
    std_key: str | None = None
    logarithmic: bool = False


_AUC = _View(
    "auc",
    "test AUC",
    "test.auc",
    "Higher is better; 0.5 is chance. Bars are 95% confidence intervals: where they overlap "
    "widely, the sweep does not settle which setting is better.",
    interval_key="test.auc_ci",
)
_QUALITY = {
    "wsi": _AUC,
    "ct": _AUC,
    "spine": _View(
        "mae_mm",
        "test SVA error, mm",
        "test.mae_mm",
        "Mean absolute error of SVA: lower is better. Bars are 95% confidence intervals: where "
        "they overlap widely, the sweep does not settle which setting is better.",
        interval_key="test.mae_ci_mm",
    ),
}
_THROUGHPUT = _View(
    "throughput",
    "training images/s",
    "throughput.images_per_s.mean",
    "Trained on each second, on a logarithmic scale. Bars are one standard deviation over "
    "steps, warm-up left out.",
    std_key="throughput.images_per_s.std",
    logarithmic=True,
)
_PROCESS_MEMORY = _View(
    "process_memory",
    "peak process memory, GiB",
    "memory_use.rss_peak_bytes",
    "The most main memory that the process held at once, data loading included.",
)
_DEVICE_MEMORY = _View(
    "device_memory",
    "peak device memory, GiB",
    "memory_use.device_peak_bytes",
    "The most device memory that training held at once: weights, gradients, optimizer and maps.",
)


def sweep_plot(path: Path, records: list[Record], axis: str) -> Path:
    """Draw all views beside each other into one picture, and return its path."""
    views = _views(records)
    with drawing(path, (3.7 * len(views), 3.4)) as canvas:
        panels = canvas.subplots(1, len(views), squeeze=False)[0]
        for axes, view in zip(panels, views, strict=True):
            _draw(axes, records, axis, view)
    return path


def sweep_plots(folder: Path, records: list[Record], axis: str) -> list[Picture]:
    """Draw each view into a picture of its own, `sweep_<name>.png`."""
    pictures = []
    for view in _views(records):
        path = folder / f"sweep_{view.name}.png"
        with drawing(path) as canvas:
            _draw(canvas.subplots(), records, axis, view)
        title = f"{view.label[0].upper()}{view.label[1:]} against {axis}"
        pictures.append(Picture(path, title, f"{title}, {len(records)} jobs", view.caption))
    return pictures


def _views(records: list[Record]) -> list[_View]:
    datasets = dict.fromkeys(record["dataset"] for record in records)
    views = [_QUALITY[dataset] for dataset in datasets if dataset in _QUALITY]
    units = " or ".join(dict.fromkeys(throughput_unit(record) for record in records))
    views += [replace(_THROUGHPUT, label=f"training {units}/s"), _PROCESS_MEMORY]
    if any(record["device"] == "cuda" for record in records):
        views.append(_DEVICE_MEMORY)
    return views


@dataclass(frozen=True)
class _Line:
    """Jobs that differ in the axis only, and where each of its values is drawn.

    `lost_at` is the height, above the axes, of the marks of jobs that ran out of memory: inside
    they would pass for values.
    """

    name: str
    colour: str
    records: list[Record]
    xs: list[float]
    lost_at: float


def _draw(axes: Axes, records: list[Record], axis: str, view: _View) -> None:
    place = _places([record["axes"][axis] for record in records])
    for line in _lines(records, axis, place):
        _draw_line(axes, line, view)
    if view.logarithmic and any(figure(r, view.key) is not None for r in records):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=axis, ylabel=view.label)
    _ticks(axes, place)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def _lines(records: list[Record], axis: str, place: dict[str, float]) -> list[_Line]:
    together: dict[str, list[Record]] = {}
    for record in records:
        others = (f"{key}={value}" for key, value in record["axes"].items() if key != axis)
        together.setdefault(", ".join(others), []).append(record)
    span = max(place.values()) - min(place.values()) or 1.0
    lines = []
    for i, (name, jobs) in enumerate(together.items()):
        shift = (i - (len(together) - 1) / 2) * _DODGE * span
        jobs = sorted(jobs, key=lambda record: place[record["axes"][axis]])
        xs = [place[record["axes"][axis]] + shift for record in jobs]
        lines.append(_Line(name, COLOURS[i % len(COLOURS)], jobs, xs, 1.03 + 0.05 * i))
    return lines


def _draw_line(axes: Axes, line: _Line, view: _View) -> None:
    jobs = list(zip(line.xs, line.records, strict=True))
    known = [(x, r) for x, r in jobs if r["status"] == "ok" and figure(r, view.key) is not None]
    if known:
        scale = 2**30 if view.key.endswith("bytes") else 1
        values = [figure(record, view.key) / scale for _, record in known]
        axes.errorbar(
            [x for x, _ in known],
            values,
            _bars(values, [record for _, record in known], view),
            color=line.colour,
            marker="o",
            capsize=3,
            elinewidth=1.2,
            label=line.name or None,
        )
    lost = [x for x, record in jobs if record["status"] == "oom"]
    if lost:
        axes.plot(
            lost,
            [line.lost_at] * len(lost),
            "x",
            color=line.colour,
            markersize=8,
            markeredgewidth=2,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label=f"{line.name}: out of memory" if line.name else "out of memory",
        )


def _bars(values: list[float], records: list[Record], view: _View) -> list[list[float]]:
    """Return how far the bars go below and above each value; nowhere where that is not known."""
    below, above = [], []
    for value, record in zip(values, records, strict=True):
        bounds = figure(record, view.interval_key) if view.interval_key else None
        std = figure(record, view.std_key) if view.std_key else None
        low, high = bounds or (value - (std or 0.0), value + (std or 0.0))
        below.append(max(0.0, value - low))
        above.append(max(0.0, high - value))
    return [below, above]


def _ticks(axes: Axes, place: dict[str, float]) -> None:
    words = any(text != f"{x:g}" for text, x in place.items())
    if words or len(place) <= _MOST_TICKS:
        axes.set_xticks(list(place.values()), list(place))


def _places(values: Sequence[str]) -> dict[str, float]:
    """Return where each value of an axis is drawn: at its number, or in order if any is none."""
    try:
        return {text: float(text) for text in values}
    except ValueError:
        return {text: float(place) for place, text in enumerate(dict.fromkeys(values))}
