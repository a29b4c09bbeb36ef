"""Draws umtrain/streaming/method.png: one residual block, forward and backward, strip by strip."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

MAP, STRIP, BACK = "#dbe7f3", "#2b6cb0", "#c05621"
HEIGHT, WIDTH = 3.0, 1.15
COLUMNS = {"x": 0.0, "y₁": 3.6, "y₂": 7.2, "z": 10.8}
LABELS = {
    "x": "block's input",
    "y₁": "raw output,\nmean₁, var₁",
    "y₂": "raw output,\nmean₂, var₂",
    "z": "block's output",
}
SEGMENTS = [
    ("x", "y₁", "conv 3×3", "moments of y₁\nadded up"),
    ("y₁", "y₂", "normalise, rectify\nconv 3×3", "moments of y₂\nadded up"),
    ("y₂", "z", "normalise,\nadd x, rectify", ""),
]
GRADIENTS = [
    ("z", "y₂", "g = dz where z > 0\nΣg, Σg(y₂-mean₂)"),
    ("y₂", "y₁", "dy₂ = s·g + a + b·y₂\nconv backward; Σg, Σg(y₁-mean₁)"),
    ("y₁", "x", "dy₁ = s·g + a + b·y₁\nconv backward; dx += …"),
]


def feature_map(axes, name: str, bottom: float, strip_rows: tuple[float, float], color: str):
    x = COLUMNS[name]
    axes.add_patch(Rectangle((x, bottom), WIDTH, HEIGHT, fc=MAP, ec="#5a6b7b", lw=1))
    low, high = strip_rows
    axes.add_patch(Rectangle((x, bottom + low), WIDTH, high - low, fc=color, alpha=0.75, lw=0))


def arrow(axes, start: tuple[float, float], stop: tuple[float, float], color: str, bend: float = 0):
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, stop, connectionstyle=style, arrowstyle="-|>", mutation_scale=13, color=color
        )
    )


def main() -> None:
    figure, axes = plt.subplots(figsize=(12, 7.6), constrained_layout=True)
    forward_y, backward_y = 4.9, 0.0
    for name, x in COLUMNS.items():
        rows = (1.15, 1.85) if name in ("x", "y₁") else (1.3, 1.7)
        feature_map(axes, name, forward_y, rows, STRIP)
        feature_map(axes, name, backward_y, (1.3, 1.7), BACK)
        axes.text(
            x + WIDTH / 2, forward_y + HEIGHT - 0.4, name, ha="center", size=14, weight="bold"
        )
        axes.text(x + WIDTH / 2, forward_y - 0.12, LABELS[name], ha="center", va="top", size=9)
        axes.text(
            x + WIDTH / 2, backward_y - 0.12, f"gradient for {name}", ha="center", va="top", size=9
        )
    for source, target, above, below in SEGMENTS:
        start = (COLUMNS[source] + WIDTH + 0.05, forward_y + 1.5)
        stop = (COLUMNS[target] - 0.05, forward_y + 1.5)
        arrow(axes, start, stop, STRIP)
        middle = (start[0] + stop[0]) / 2
        axes.text(middle, forward_y + 1.62, above, ha="center", va="bottom", size=10)
        axes.text(middle, forward_y + 1.36, below, ha="center", va="top", size=9, color="#444444")
    top = forward_y + HEIGHT
    arrow(
        axes,
        (COLUMNS["x"] + WIDTH / 2, top + 0.03),
        (COLUMNS["z"] + WIDTH / 2, top + 0.03),
        "#888888",
        -0.07,
    )
    for source, target, text in GRADIENTS:
        start = (COLUMNS[source] - 0.05, backward_y + 1.5)
        stop = (COLUMNS[target] + WIDTH + 0.05, backward_y + 1.5)
        arrow(axes, start, stop, BACK)
        middle = (start[0] + stop[0]) / 2
        axes.text(middle, backward_y + 1.64, text, ha="center", va="bottom", size=8.5)
    axes.text(-0.4, forward_y + 1.5, "forward", rotation=90, va="center", ha="right", size=12)
    axes.text(-0.4, backward_y + 1.5, "backward", rotation=90, va="center", ha="right", size=12)
    axes.text(
        -0.1, forward_y + HEIGHT + 0.75,
        "A residual block. Pale: maps held as a whole. Dark: the strip at work, with its halo.",
        size=10.5,
    )  # fmt: skip
    axes.set(xlim=(-1, 12.4), ylim=(-0.8, 9.0))
    axes.axis("off")
    figure.savefig(Path(__file__).parents[1] / "umtrain" / "streaming" / "method.png", dpi=110)


if __name__ == "__main__":
    main()
