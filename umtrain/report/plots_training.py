"""The training curve: loss of each step, and of validation."""

import csv
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from umtrain.report.canvas import BLUE, GREY, ORANGE, Absent, Panel, Picture, drawing
from umtrain.report.record import Record, figure

_TITLE = "Training"


def training_plot(run_dir: Path, record: Record) -> Panel:
    """Draw the losses in steps.csv with the validations that the record has."""
    source = run_dir / "steps.csv"
    if not source.exists():
        return Absent(_TITLE, f"the run directory has no {source.name}")
    with source.open(newline="", encoding="utf-8") as stream:
        # Steps all of whose images were left out have no loss.
        steps = [row for row in csv.DictReader(stream) if row["loss"] != "nan"]
    if not steps:
        return Absent(_TITLE, "no step had finished")
    path = run_dir / "training.png"
    ends = {int(step["epoch"]): int(step["step"]) for step in steps}
    known = [
        (ends[validation["epoch"]], validation["loss"])
        for validation in figure(record, "train.validations") or []
        if validation["loss"] is not None and validation["epoch"] in ends
    ]
    with drawing(path) as canvas:
        axes = canvas.subplots()
        losses = [float(step["loss"]) for step in steps]
        axes.plot(range(1, len(losses) + 1), losses, color=GREY, alpha=0.35, linewidth=0.8)
        axes.plot(*_smooth(losses), color=BLUE, label="training, smoothed")
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=ORANGE, label="validation")
        axes.set(xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return Picture(
        path,
        _TITLE,
        f"Loss over {len(steps)} training steps and {len(known)} validations",
        "Both losses should fall together. Validation that rises while training falls means that "
        "the network learns the training images by heart; the weights kept are those of the best "
        "validation.",
    )


def _smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    window = max(1, len(losses) // 20)
    ends = range(window, len(losses) + 1)
    return list(ends), [sum(losses[end - window : end]) / window for end in ends]
