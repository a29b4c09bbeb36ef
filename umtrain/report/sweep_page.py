"""report.html of a sweep: what changed with what, a row a job, why jobs did not finish."""

from pathlib import Path

from umtrain.console import format_duration
from umtrain.report.facts import Cell, Link, TextTable
from umtrain.report.page import REPORT_NAME, Album, link, write_page
from umtrain.report.plots_sweep import sweep_plots
from umtrain.report.record import Record, figure, throughput_unit
from umtrain.report.tables import quality, quality_name, sweep_cells
from umtrain.report.verdict import sweep_verdict
from umtrain.report.wording import NOTHING
from umtrain.units import format_bytes


def write_sweep_page(
    folder: Path, records: list[Record], axes: list[str], run_dirs: list[Path]
) -> Path:
    """Draw the sweep's pictures and write its page; `run_dirs` are the folders of its jobs."""
    album = Album(folder)
    axis = main_axis(axes)
    tables = [_jobs_table(folder, records, axes, run_dirs)]
    if set(axes) == {"res", "memory"}:
        tables.append(_strategies_table(records))
    return write_page(
        folder / REPORT_NAME,
        "sweep.html",
        title=f"Sweep of {', '.join(axes)}",
        verdict=sweep_verdict(records),
        pictures=[album.panel(picture) for picture in sweep_plots(folder, records, axis)],
        tables=tables,
        reasons=_reasons(records),
        provenance=_provenance_table(records),
    )


def main_axis(axes: list[str]) -> str:
    """Return the axis that pictures are drawn against: the resolution, if it is one of them."""
    return "res" if "res" in axes else axes[0]


def _jobs_table(
    folder: Path, records: list[Record], axes: list[str], run_dirs: list[Path]
) -> TextTable:
    names = list(dict.fromkeys(quality_name(record["dataset"]) for record in records))
    rows: list[tuple[Cell, ...]] = []
    for record, run_dir in zip(records, run_dirs, strict=True):
        speed, step, peak, _, status = sweep_cells(record)
        point = ", ".join(str(record["axes"][axis]) for axis in axes)
        page = run_dir / REPORT_NAME
        first: Cell = Link(point, link(page, folder)) if page.is_file() else point
        device_peak = figure(record, "memory_use.device_peak_bytes")
        took_s = record.get("elapsed_s")
        rows.append(
            (
                *(first, quality(record), speed, step, peak),
                NOTHING if device_peak is None else format_bytes(device_peak),
                NOTHING if took_s is None else format_duration(took_s),
                status,
            )
        )
    units = " or ".join(dict.fromkeys(throughput_unit(record) for record in records))
    columns = (
        *(", ".join(axes), f"test {' or '.join(names)}", f"{units}/s", "step, s"),
        *("process memory, peak", "device memory, peak", "took", "status"),
    )
    return TextTable("Speeds are mean ± standard deviation over steps", rows, columns)


def _strategies_table(records: list[Record]) -> TextTable:
    strategies = list(dict.fromkeys(record["memory"] for record in records))
    rows: list[tuple[Cell, ...]] = []
    for res in sorted({record["res"] for record in records}):
        cells = {r["memory"]: sweep_cells(r)[0] for r in records if r["res"] == res}
        rows.append((str(res), *(cells.get(strategy, NOTHING) for strategy in strategies)))
    return TextTable("Images/s by resolution and memory strategy", rows, ("res", *strategies))


def _reasons(records: list[Record]) -> dict[str, str]:
    return {
        ", ".join(f"{key}={value}" for key, value in record["axes"].items()): str(
            record["reasons"].get("status", "the record gives no reason")
        )
        for record in records
        if record["status"] != "ok"
    }


def _provenance_table(records: list[Record]) -> TextTable:
    """Return what the jobs have in common, and every value where they differ."""
    keys = {
        "Dataset": "dataset",
        "Model": "model",
        "Precision": "precision",
        "Device": "device",
        "Seed": "seed",
        "Machine": "environment.device_name",
        "Source revision": "environment.git",
        "umtrain": "environment.versions.umtrain",
        "torch": "environment.versions.torch",
        "Manifest": "data.manifest",
        "SHA-256 of the manifest": "data.manifest_sha256",
        "Training images": "data.n_train",
        "Validation images": "data.n_val",
        "Test images": "data.n_test",
    }
    rows: list[tuple[Cell, ...]] = []
    for name, key in keys.items():
        found = (figure(record, key) for record in records)
        values = dict.fromkeys(str(value) for value in found if value is not None)
        rows.append((name, "; ".join(values) or NOTHING))
    return TextTable("What the jobs have in common; several values where they differ", rows)
