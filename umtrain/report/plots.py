"""All pictures of one run, drawn from its record and tables."""

from pathlib import Path
from typing import Any

from umtrain.report.canvas import Panel
from umtrain.report.plots_classification import classification_plots
from umtrain.report.plots_keypoints import keypoint_plots
from umtrain.report.plots_training import training_plot
from umtrain.report.record import Record


def run_plots(run_dir: Path, record: Record, predictions: list[dict[str, Any]]) -> list[Panel]:
    """Draw the test (else validation) predictions of one run, and its training curve."""
    draw = keypoint_plots if record["dataset"] == "spine" else classification_plots
    for split in ("test", "val"):
        rows = [row for row in predictions if row["split"] == split]
        if rows:
            return [*draw(run_dir, record, rows, split), training_plot(run_dir, record)]
    return [training_plot(run_dir, record)]
