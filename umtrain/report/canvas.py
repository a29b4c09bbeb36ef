"""What all pictures of a report share: their look, and the words that go with each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from umtrain.files import write_atomic

BLUE, ORANGE, GREY = "#2f6f9f", "#d1702a", "#6d747d"
COLOURS = (BLUE, ORANGE, "#3b8a5a", "#7a5aa6", "#b0485e", "#4d5661")
PANEL_INCHES = (4.6, 4.0)
_DPI = 160
_STYLE = {
    "text.parse_math": False,  # a label may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "font.size": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Picture:
    """A PNG beside a page: `alt` says what it is, `caption` what to see in it."""

    path: Path
    title: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Absent:
    """A picture that could not be had, and why."""

    title: str
    reason: str


Panel = Picture | Absent


@contextmanager
def drawing(path: Path, inches: tuple[float, float] = PANEL_INCHES) -> Iterator[Figure]:
    """Yield an empty figure; write it to `path` as PNG when the block ends."""
    with mpl.rc_context(_STYLE):
        canvas = Figure(figsize=inches, layout="constrained")
        yield canvas
        write_atomic(path, lambda stream: canvas.savefig(stream, format="png", dpi=_DPI))
