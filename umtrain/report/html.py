"""report.html of one run: verdict, pictures, figures, cases, data, memory, provenance."""

from pathlib import Path
from typing import Any

from umtrain.report.canvas import Panel, Picture
from umtrain.report.facts import (
    data_tables,
    memory_table,
    provenance_table,
    quality_tables,
    time_table,
)
from umtrain.report.page import REPORT_NAME, Album, Shown, write_page
from umtrain.report.plots import run_plots
from umtrain.report.reasons import all_reasons
from umtrain.report.record import Record, figure
from umtrain.report.verdict import run_verdict
from umtrain.report.wording import SPLIT_NAMES, image_name

_N_OPEN_CASES = 4
_TIMELINE_WORDS = (
    "Timeline of one step",
    "Bars over time of forward, backward, transfers and waiting in one training step",
    "What was computed and what was moved between device and host memory in one training step. "
    "Transfers below the bars of forward and backward cost no time; stalls do.",
)


def write_run_page(run_dir: Path, record: Record, predictions: list[dict[str, Any]]) -> Path:
    """Draw the run's pictures and write its page; return the page's path."""
    panels = run_plots(run_dir, record, predictions)
    return write_report(run_dir, record, panels, _spacing_mm(predictions))


def write_report(
    run_dir: Path,
    record: Record,
    panels: list[Panel],
    spacing_mm: tuple[float, float] | None = None,
) -> Path:
    """Write the page of one run, with its pictures inside, and return its path."""
    album = Album(run_dir)
    pictures = [album.panel(panel) for panel in panels]
    timeline = Picture(run_dir / "timeline.png", *_TIMELINE_WORDS)
    kind = f"{image_name(record['dataset'])}s"
    config = run_dir / "config.yaml"
    return write_page(
        run_dir / REPORT_NAME,
        "run.html",
        title=f"{kind.capitalize()} · {record['model']} · res {record['res']}",
        verdict=run_verdict(record),
        pictures=pictures,
        tables=quality_tables(record),
        cases=_cases(run_dir, record, album),
        data_tables=data_tables(record, spacing_mm),
        memory_tables=[memory_table(record), time_table(record)],
        timeline=album.panel(timeline) if timeline.path.is_file() else None,
        annotation=figure(record, "annotation"),
        reasons=all_reasons(record),
        provenance=provenance_table(run_dir, record),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def _cases(run_dir: Path, record: Record, album: Album) -> list[dict[str, Any]]:
    """Return the cases of each split that has any: those shown at once, and the folded ones."""
    found = []
    for split in ("test", "val"):
        cases: list[Shown] = [
            album.case(case, run_dir) for case in figure(record, f"{split}.cases") or []
        ]
        if cases:
            found.append(
                {
                    "split": SPLIT_NAMES[split],
                    "open": cases[:_N_OPEN_CASES],
                    "folded": cases[_N_OPEN_CASES:],
                }
            )
    return found


def _spacing_mm(predictions: list[dict[str, Any]]) -> tuple[float, float] | None:
    spacings = [float(row["mm_per_px"]) for row in predictions if row.get("mm_per_px")]
    return (min(spacings), max(spacings)) if spacings else None
