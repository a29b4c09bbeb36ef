"""Pictures of single cases: a map over a slide, the keypoints and plumb lines on a radiograph."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from numpy.typing import NDArray
from PIL import Image

from umtrain.files import write_atomic

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Point = tuple[float, float]

_DPI = 100
_N_COLOURS = 256
# Haematoxylin and eosin are blue to pink: viridis' green and yellow are seen on them, magma is not.
_MAP_COLOURS = "viridis"
_MOST_OPAQUE = 0.75
_SCALE_SHARE = 0.25  # of the slide's picture that a scale bar may take, at most
_TRUE, _PREDICTED = "#56b4e9", "#e69f00"  # Okabe & Ito: told apart by the colour-blind, and on grey
_FILM_PX = 900
_MARGIN_SHARE = 0.12  # of the height between the keypoints that is shown around them
_LEAST_WIDTH_SHARE = 0.5
_LEAST_HEIGHT_MM = 50.0


@dataclass(frozen=True)
class Keypoints:
    """C7 and S1 as (x, y) in pixels of the stored film, and the SVA between them."""

    c7_xy: Point
    s1_xy: Point
    sva_mm: float


def map_beside_slide(
    slide: Pixels,
    values: Floats,
    *,
    title: str,
    meaning: str,
    levels: Sequence[float] = (),
    um_per_px: float | None = None,
) -> Figure:
    """Draw `slide`, uint8 (h, w, 3), and beside it the same with a map over it.

    `values` (h, w) are 0..1, the more opaque the higher, with lines at `levels`; `meaning` is the
    colour bar's label. With `um_per_px`, microns per pixel of `slide`, there is a scale bar.
    """
    canvas = Figure(figsize=(11, 5.4), dpi=_DPI, layout="constrained")
    left, right = canvas.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(slide, interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
    drawn = right.imshow(values, cmap=_fading_colours(), vmin=0, vmax=1, interpolation="nearest")
    bar = canvas.colorbar(drawn, ax=right, label=meaning, fraction=0.05, pad=0.02)
    crossed = [level for level in sorted(levels) if values.min() < level < values.max()]
    if crossed:
        lines = right.contour(values, crossed, colors="black", linewidths=0.7)
        bar.add_lines(lines)
    if um_per_px is not None:
        _scale_bar(left, um_per_px, slide.shape[1])
    canvas.suptitle(title, fontsize=11, parse_math=False)
    return canvas


def _fading_colours() -> ListedColormap:
    """Return the map's colours, from transparent to nearly opaque."""
    share = np.linspace(0, 1, _N_COLOURS)
    colours = mpl.colormaps[_MAP_COLOURS](share)
    colours[:, 3] = _MOST_OPAQUE * share
    return ListedColormap(colours)


def _scale_bar(axes: Axes, um_per_px: float, width_px: int) -> None:
    length_um = round_length(_SCALE_SHARE * width_px * um_per_px)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    bar = AnchoredSizeBar(
        axes.transData,
        length_um / um_per_px,
        label,
        "lower right",
        pad=0.4,
        borderpad=0.5,
        sep=3,
        size_vertical=width_px / 150,
    )
    bar.patch.set(alpha=0.8, linewidth=0)
    axes.add_artist(bar)


def round_length(most: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is no more than `most`."""
    power = 10.0 ** np.floor(np.log10(most))
    # 0.5 too: the logarithm of a number just below a power of ten is rounded up to it.
    return float(max(digit * power for digit in (0.5, 1, 2, 5) if digit * power <= most))


def sva_on_film(
    film: NDArray[np.uint16],
    true: Keypoints,
    predicted: Keypoints,
    spacing_mm: tuple[float, float],
) -> Figure:
    """Draw the part of a film, uint16 (rows, columns), that has the keypoints, true and predicted.

    For each of both: the plumb line through C7, and from it the SVA to S1. The film is shown as it
    is stored, `spacing_mm` (row, column) giving its proportions.
    """
    x0, y0, x1, y1 = crop_box(film.shape, true, predicted, spacing_mm)
    row_mm, column_mm = spacing_mm
    shown_height = (y1 - y0) * row_mm
    shown_width = (x1 - x0) * column_mm
    scale = _FILM_PX / _DPI / max(shown_height, shown_width)
    height_in, width_in = shown_height * scale, shown_width * scale
    canvas = Figure(figsize=(max(width_in, 3.6), height_in + 1.0), dpi=_DPI, layout="constrained")
    axes = canvas.subplots()
    part = Image.fromarray(film[y0:y1, x0:x1].astype(np.float32))
    shape_px = (round(width_in * _DPI), round(height_in * _DPI))
    axes.imshow(
        np.asarray(part.resize(shape_px, Image.Resampling.BILINEAR)),
        cmap="gray",
        vmin=0,
        vmax=2**16 - 1,
        extent=(x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5),
        aspect=row_mm / column_mm,
    )
    _measured(axes, true, _TRUE, "-", "o")
    _measured(axes, predicted, _PREDICTED, "--", "x")
    _names(axes, true, "left" if predicted.c7_xy[0] > true.c7_xy[0] else "right")
    axes.set(xticks=[], yticks=[], xlim=(x0 - 0.5, x1 - 0.5), ylim=(y1 - 0.5, y0 - 0.5))
    error_mm = abs(predicted.sva_mm - true.sva_mm)
    axes.set_title(f"SVA error {error_mm:.1f} mm", fontsize=11)
    canvas.legend(handles=_legend(true, predicted), loc="outside lower center", frameon=False)
    return canvas


def crop_box(
    shape: tuple[int, ...], true: Keypoints, predicted: Keypoints, spacing_mm: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the part of a film to show, right and bottom excluded.

    All four points with a margin; at least half as wide as high, so that one sees the spine.
    """
    points = np.array([true.c7_xy, true.s1_xy, predicted.c7_xy, predicted.s1_xy])
    row_mm, column_mm = spacing_mm
    low, high = points.min(axis=0), points.max(axis=0)
    margin_mm = _MARGIN_SHARE * max((high[1] - low[1]) * row_mm, (high[0] - low[0]) * column_mm)
    height_mm = max((high[1] - low[1]) * row_mm + 2 * margin_mm, _LEAST_HEIGHT_MM)
    width_mm = (high[0] - low[0]) * column_mm + 2 * margin_mm
    width_mm = max(width_mm, _LEAST_WIDTH_SHARE * height_mm)
    x0, x1 = _span((low[0] + high[0]) / 2, width_mm / column_mm, shape[1])
    y0, y1 = _span((low[1] + high[1]) / 2, height_mm / row_mm, shape[0])
    return x0, y0, x1, y1


def _span(centre_px: float, length_px: float, side_px: int) -> tuple[int, int]:
    """Return first and past-last pixel of an axis: moved, and if need be cut, to lie inside."""
    length = min(max(2, round(length_px)), side_px)
    first = min(max(0, round(centre_px - length / 2)), side_px - length)
    return first, first + length


def _measured(axes: Axes, points: Keypoints, colour: str, line: str, marker: str) -> None:
    (c7_x, c7_y), (s1_x, s1_y) = points.c7_xy, points.s1_xy
    axes.plot([c7_x, c7_x, s1_x], [c7_y, s1_y, s1_y], color=colour, linestyle=line, linewidth=1.4)
    axes.plot(
        [c7_x, s1_x],
        [c7_y, s1_y],
        color=colour,
        marker=marker,
        linestyle="none",
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=1.8,
    )


def _names(axes: Axes, points: Keypoints, side: str) -> None:
    for name, xy in (("C7", points.c7_xy), ("S1", points.s1_xy)):
        axes.annotate(
            name,
            xy,
            xytext=(-12 if side == "left" else 12, 0),
            textcoords="offset points",
            ha="right" if side == "left" else "left",
            va="center",
            color="white",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.6, "linewidth": 0},
        )


def _legend(true: Keypoints, predicted: Keypoints) -> list[Line2D]:
    rows = (
        ("true", true, _TRUE, "-", "o"),
        ("predicted", predicted, _PREDICTED, "--", "x"),
    )
    return [
        Line2D(
            [],
            [],
            color=colour,
            linestyle=line,
            marker=marker,
            markerfacecolor="none",
            label=f"{name}: SVA {points.sva_mm:+.1f} mm",
        )
        for name, points, colour, line, marker in rows
    ]


def save_picture(canvas: Figure, path: Path) -> None:
    """Write `canvas` to `path` as a PNG of 256 colours, half the size of full colour."""
    drawn = FigureCanvasAgg(canvas)
    drawn.draw()
    pixels = np.asarray(drawn.buffer_rgba())[..., :3]
    full = Image.fromarray(np.ascontiguousarray(pixels))
    # Dithered: without, a smooth map has steps that look like findings.
    dither = Image.Dither.FLOYDSTEINBERG
    picture = full.quantize(palette=full.quantize(_N_COLOURS), dither=dither)
    write_atomic(path, lambda stream: picture.save(stream, format="PNG", optimize=True))
