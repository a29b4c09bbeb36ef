"""Write what a trace holds: trace.json for Perfetto or chrome://tracing, and timeline.png."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from umtrain.memory.trace import LANES, Lane, Span, Trace
from umtrain.units import format_bytes

_COLOURS: dict[Lane, str] = {
    "forward": "tab:blue",
    "backward": "tab:cyan",
    "swap-out": "tab:orange",
    "swap-in": "tab:green",
    "fault": "tab:red",
    "stall": "tab:gray",
}
_THINNEST_SHARE = 0.001  # of the step: a span that is a moment is drawn this wide


def write_timeline(trace: Trace, folder: Path, title: str) -> None:
    """Write trace.json (all steps kept) and timeline.png (the last one) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    spans = trace.spans()
    (folder / "trace.json").write_text(json.dumps(chrome_trace(spans)))
    draw_timelines({title: last_step(spans)}, folder / "timeline.png")


def last_step(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of the last step among `spans`."""
    last = max((span.step for span in spans), default=0)
    return [span for span in spans if span.step == last]


def read_trace(path: Path) -> list[Span]:
    """Return the spans that trace.json holds; times from its first one on."""
    events = json.loads(path.read_text())["traceEvents"]
    return [
        Span(
            step=event["args"]["step"],
            lane=event["cat"],
            name=event["name"],
            start_s=event["ts"] / 1e6,
            end_s=(event["ts"] + event["dur"]) / 1e6,
            n_bytes=event["args"]["bytes"],
        )
        for event in events
        if event["ph"] == "X"
    ]


def chrome_trace(spans: Sequence[Span]) -> dict[str, object]:
    """Return spans in Chrome's Trace Event Format: complete events, one thread per lane."""
    start_s = spans[0].start_s if spans else 0.0
    names = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": 0,
            "tid": LANES.index(lane),
            "args": {"name": lane},
        }
        for lane in LANES
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "cat": span.lane,
            "pid": 0,
            "tid": LANES.index(span.lane),
            "ts": (span.start_s - start_s) * 1e6,
            "dur": (span.end_s - span.start_s) * 1e6,
            "args": {"step": span.step, "bytes": span.n_bytes},
        }
        for span in spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": names + events}


def draw_timelines(steps: Mapping[str, Sequence[Span]], path: Path) -> None:
    """Draw steps by their titles, one below the other on one scale of time."""
    figure, rows = plt.subplots(
        len(steps),
        figsize=(14, 4 * len(steps)),
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    for axes, (title, spans) in zip(rows[:, 0], steps.items(), strict=True):
        if spans:
            _draw_lanes(axes, spans)
        axes.set_yticks(range(len(LANES)), [_lane_label(lane, spans) for lane in LANES])
        axes.set_ylim(len(LANES) - 0.5, -1.0)
        axes.set_title(title)
    rows[-1, 0].set_xlabel("seconds since the start of the step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_lanes(axes: Axes, spans: Sequence[Span]) -> None:
    start_s = min(span.start_s for span in spans)
    thinnest_s = _THINNEST_SHARE * (max(span.end_s for span in spans) - start_s)
    for lane in LANES:
        bars = [
            (span.start_s - start_s, max(span.end_s - span.start_s, thinnest_s))
            for span in spans
            if span.lane == lane
        ]
        row = LANES.index(lane) - 0.4
        # Groups are told apart by white edges, which would hide spans that are a moment.
        edge = 0.3 if lane in ("forward", "backward") else 0.0
        axes.broken_barh(bars, (row, 0.8), color=_COLOURS[lane], edgecolor="white", linewidth=edge)
    backward_s = [span.start_s - start_s for span in spans if span.lane == "backward"]
    if backward_s:
        axes.axvline(min(backward_s), color="black", linestyle=":", linewidth=1)
        axes.text(min(backward_s), -0.5, " backward", va="bottom", fontsize=8)
    axes.text(0.0, -0.5, "forward", va="bottom", fontsize=8)


def _lane_label(lane: Lane, spans: Sequence[Span]) -> str:
    n_bytes = sum(span.n_bytes for span in spans if span.lane == lane)
    return f"{lane}\n{format_bytes(n_bytes)}" if n_bytes else lane
