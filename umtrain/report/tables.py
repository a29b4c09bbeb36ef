"""Records as tables: one run, or a sweep with resolutions down and strategies across."""

from typing import Any

from rich.table import Table
from rich.text import Text

from umtrain.report.record import Record, figure, throughput_unit
from umtrain.report.wording import NOTHING, estimate
from umtrain.units import format_bytes


def mean_std(summary: dict[str, Any] | None, digits: int = 2) -> str:
    """Return "mean ± std" of a summary, a dash if there is none."""
    if not summary or summary.get("mean") is None:
        return NOTHING
    text = f"{summary['mean']:.{digits}f}"
    return text if summary.get("std") is None else f"{text} ± {summary['std']:.{digits}f}"


def quality(record: Record, split: str = "test") -> str:
    """Return the split's headline with its interval: AUC, or SVA error in mm."""
    section = record.get(split) or {}
    if section.get("auc") is not None:
        return estimate(section["auc"], section.get("auc_ci"), 3)
    return estimate(section.get("mae_mm"), section.get("mae_ci_mm"))


def quality_name(dataset: str) -> str:
    """Return the words over the headline column of `dataset`."""
    return "SVA MAE, mm (95% CI)" if dataset == "spine" else "AUC (95% CI)"


def run_table(record: Record) -> Table:
    """Return one run's figures as name and value."""
    table = Table(title=f"{record['dataset']} {record['model']} res={record['res']}", min_width=50)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in run_rows(record):
        table.add_row(Text(name), Text(value))
    return table


def run_rows(record: Record) -> list[tuple[str, str]]:
    """Return one run's figures as (name, text) pairs; a figure that is null shows a dash."""
    rows = [("status", str(record["status"]))]
    for split in ("test", "val"):
        rows += _quality_rows(record, split)
    peak = figure(record, "memory_use.device_peak_bytes")
    rss = figure(record, "memory_use.rss_peak_bytes")
    return [
        *rows,
        (f"train {throughput_unit(record)}/s", mean_std(figure(record, "throughput.images_per_s"))),
        ("step, s", mean_std(figure(record, "throughput.step_s"), 3)),
        ("device memory, peak", NOTHING if peak is None else format_bytes(peak)),
        ("process memory, peak", NOTHING if rss is None else format_bytes(rss)),
        ("memory strategy", str(record["memory"])),
        ("precision, device", f"{record['precision']}, {record['device']}"),
    ]


def _quality_rows(record: Record, split: str) -> list[tuple[str, str]]:
    section = record.get(split)
    if not section:
        return []
    rows = [(f"{split} {quality_name(record['dataset'])}", quality(record, split))]
    rows += [
        (f"{split} {key} (95% CI)", estimate(section[key], section.get(f"{key}_ci"), 3))
        for key in ("sensitivity", "specificity")
        if section.get(key) is not None
    ]
    named = {
        "accuracy": ("accuracy", 3),
        "median_ae_mm": ("SVA median AE, mm", 2),
        "c7_radial_mm": ("C7 radial error, mm", 2),
        "s1_radial_mm": ("S1 radial error, mm", 2),
    }
    for key, (name, digits) in named.items():
        value = section.get(key)
        if isinstance(value, dict):
            value = value.get("mean")
        if value is not None:
            rows.append((f"{split} {name}", f"{value:.{digits}f}"))
    rows.append((f"{split} images", str(section["n"])))
    return rows


def sweep_table(records: list[Record], axes: list[str]) -> Table:
    """Return a sweep as a table: a row per job, its axes first."""
    names = list(dict.fromkeys(quality_name(record["dataset"]) for record in records))
    table = Table(title="sweep")
    for name in (*axes, "images/s", "step, s", "peak memory", " or ".join(names), "status"):
        table.add_column(name, justify="right")
    for record in records:
        # As Text: what a user wrote is no markup, whatever brackets it has.
        cells = (*(str(record["axes"].get(axis)) for axis in axes), *sweep_cells(record))
        table.add_row(*map(Text, cells))
    return table


def sweep_cells(record: Record) -> list[str]:
    """Return a job's figures as the sweep's columns show them; OOM where it did not fit."""
    status = str(record["status"])
    if status == "oom":
        return ["OOM", NOTHING, NOTHING, NOTHING, "oom"]
    peak = figure(record, "memory_use.rss_peak_bytes")
    rate = mean_std(figure(record, "throughput.images_per_s"))
    unit = throughput_unit(record)
    return [
        rate if unit == "images" or rate == NOTHING else f"{rate} {unit}",
        mean_std(figure(record, "throughput.step_s"), 3),
        NOTHING if peak is None else format_bytes(peak),
        quality(record),
        status,
    ]


def group_table(rows: list[tuple[str, int, str]]) -> Table:
    """Return groups of layers as a table: name, number of layers, working set."""
    table = Table(title="groups, in forward order")
    table.add_column("group")
    table.add_column("layers", justify="right")
    table.add_column("working set", justify="right")
    for name, n_layers, working_set in rows:
        table.add_row(Text(name), str(n_layers), working_set)
    return table


def strategy_table(records: list[Record]) -> Table:
    """Return images/s with resolutions down and memory strategies across, as the talk has it."""
    strategies = list(dict.fromkeys(record["memory"] for record in records))
    table = Table(title="images/s, mean ± std over steps")
    table.add_column("res", justify="right")
    for strategy in strategies:
        table.add_column(strategy, justify="right")
    for res in sorted({record["res"] for record in records}):
        cells = {r["memory"]: sweep_cells(r)[0] for r in records if r["res"] == res}
        table.add_row(str(res), *(cells.get(strategy, "") for strategy in strategies))
    return table
