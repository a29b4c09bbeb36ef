"""report.html of a comparison: several runs on the images that they share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from umtrain.console import format_duration
from umtrain.report.facts import Cell, Link, TextTable
from umtrain.report.page import REPORT_NAME, Album, Shown, link, write_page
from umtrain.report.plots_comparison import comparison_plots
from umtrain.report.record import Record, figure, throughput_unit
from umtrain.report.tables import mean_std
from umtrain.report.verdict import comparison_verdict, shown_by
from umtrain.report.wording import (
    NOTHING,
    estimate,
    image_name,
    images,
    number,
    p_value,
)
from umtrain.units import format_bytes

Comparison = Record
_N_OPEN_ROWS = 12
_SHA_SHOWN = 12


def write_comparison_page(folder: Path, comparison: Comparison) -> Path:
    """Draw the comparison's pictures and write its page into `folder`."""
    album = Album(folder)
    table = _images_table(comparison)
    return write_page(
        folder / REPORT_NAME,
        "comparison.html",
        title=f"Comparison of {len(comparison['runs'])} runs",
        verdict=comparison_verdict(comparison),
        who=[f"{run['run']}: {run['name']} ({_described(run)})" for run in comparison["runs"]],
        pictures=[album.panel(panel) for panel in comparison_plots(folder, comparison)],
        tables=[_runs_table(folder, comparison), _tests_table(comparison)],
        cost=_cost_table(comparison),
        images=TextTable(table.caption, table.rows[:_N_OPEN_ROWS], table.columns),
        more_images=TextTable(table.caption, table.rows[_N_OPEN_ROWS:], table.columns),
        cases=_cases(comparison, album),
        cases_reason=comparison["cases_reason"],
        provenance=_provenance_table(comparison),
    )


def _runs_table(folder: Path, comparison: Comparison) -> TextTable:
    rows: list[tuple[Cell, ...]] = []
    for run in comparison["runs"]:
        shared = run["shared"]
        page = Path(run["run_dir"]) / REPORT_NAME
        name: Cell = Link(run["name"], link(page, folder)) if page.is_file() else run["name"]
        if comparison["dataset"] == "spine":
            found = (
                estimate(shared.get("mae_mm"), shared.get("mae_ci_mm")),
                number(shared.get("median_ae_mm")),
            )
        else:
            found = (
                estimate(shared.get("auc"), shared.get("auc_ci"), 3),
                number(shared.get("average_precision"), 3),
            )
        rows.append((run["run"], name, _described(run), *found))
    quality = (
        ("SVA error, mean, mm (95% CI)", "median, mm")
        if comparison["dataset"] == "spine"
        else ("AUC (95% CI)", "average precision")
    )
    n_images = images(comparison["dataset"], comparison["n_shared"])
    caption = f"The runs, on the {n_images} that all of them have predictions for"
    return TextTable(caption, rows, ("", "run", "what", *quality))


def _described(run: dict[str, Any]) -> str:
    words = (run["model"], run["approach"], f"res {run['res']}", f"memory={run['memory']}")
    return ", ".join(word for word in words if word)


def _tests_table(comparison: Comparison) -> TextTable:
    spine = comparison["dataset"] == "spine"
    suffix = "_mm" if spine else ""
    rows: list[tuple[Cell, ...]] = [
        (
            f"{test['run']}\u00a0−\u00a0{test['against']}",
            estimate(test.get(f"difference{suffix}"), test.get(f"ci{suffix}"), 3),
            p_value(test.get("p")).removeprefix("p ").removeprefix("= "),
            shown_by(test, comparison["dataset"]),
        )
        for test in comparison["tests"]
    ]
    caption = (
        "Paired tests on the same radiographs: interval by bootstrap, p by Wilcoxon's signed ranks"
        if spine
        else f"Paired tests on the same {image_name(comparison['dataset'])}s, by DeLong's method"
    )
    name = "difference of errors, mm (95% CI)" if spine else "difference of AUC (95% CI)"
    return TextTable(caption, rows, ("", name, "p", "what it shows"))


def _cost_table(comparison: Comparison) -> TextTable:
    tellers: dict[str, Callable[[Record], str]] = {
        "Training speed": _speed,
        "A step, s": lambda run: mean_std(figure(run, "throughput.step_s"), 3),
        "The whole run": lambda run: _duration(run["elapsed_s"]),
        "Process memory, peak": lambda run: _bytes(figure(run, "memory_use.rss_peak_bytes")),
        "Device memory, peak": lambda run: _bytes(figure(run, "memory_use.device_peak_bytes")),
        "Approach": lambda run: str(run["approach"] or NOTHING),
        "Memory strategy": lambda run: str(run["memory"]),
        "Precision, device": lambda run: f"{run['precision']}, {run['device']}",
        "Machine": lambda run: str(run["machine"]),
        "Annotation needed": lambda run: str(run["annotation"] or "not in the record"),
    }
    rows: list[tuple[Cell, ...]] = [
        (name, *(tell(run) for run in comparison["runs"])) for name, tell in tellers.items()
    ]
    columns = ("", *(run["run"] for run in comparison["runs"]))
    return TextTable("Speeds are mean ± standard deviation over steps", rows, columns)


def _speed(run: dict[str, Any]) -> str:
    rate = mean_std(figure(run, "throughput.images_per_s"))
    return rate if rate == NOTHING else f"{rate} {throughput_unit(run)}/s"


def _duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else format_duration(seconds)


def _bytes(n_bytes: float | None) -> str:
    return NOTHING if n_bytes is None else format_bytes(n_bytes)


def _images_table(comparison: Comparison) -> TextTable:
    """Return a row an image, those first on which the runs differ most."""
    letters = [run["run"] for run in comparison["runs"]]
    if comparison["dataset"] == "spine":
        rows: list[tuple[Cell, ...]] = [
            (
                *(image["id"], number(image["sva_true_mm"], 1)),
                *(number(pred - image["sva_true_mm"], 1) for pred in image["sva_pred_mm"]),
            )
            for image in comparison["images"]
        ]
        columns = ("radiograph", "true SVA, mm", *(f"error of {x}, mm" for x in letters))
    else:
        rows = [
            (
                *(image["id"], "positive" if image["label"] else "negative"),
                *(number(prob) for prob in image["probs"]),
            )
            for image in comparison["images"]
        ]
        columns = (
            image_name(comparison["dataset"]),
            "truth",
            *(f"probability by {x}" for x in letters),
        )
    name = image_name(comparison["dataset"])
    return TextTable(f"Every {name}, those first on which the runs differ most", rows, columns)


def _cases(comparison: Comparison, album: Album) -> list[dict[str, Any]]:
    directories = {run["run"]: Path(run["run_dir"]) for run in comparison["runs"]}
    cases = []
    for case in comparison["cases"]:
        shown: list[Shown] = [
            album.case({**one, "id": f"by {one['run']}"}, directories[one["run"]])
            for one in case["pictures"]
        ]
        cases.append({"id": case["id"], "pictures": shown})
    return cases


def _provenance_table(comparison: Comparison) -> TextTable:
    keys = {
        "Run directory": "run_dir",
        "Started": "started_at",
        "Seed": "seed",
        "SHA-256 of the manifest, its start": "manifest_sha256",
        "Source revision": "git",
        "umtrain": "umtrain",
        "torch": "torch",
    }
    rows: list[tuple[Cell, ...]] = [
        (name, *(_short(run[key], key) for run in comparison["runs"])) for name, key in keys.items()
    ]
    columns = ("", *(run["run"] for run in comparison["runs"]))
    return TextTable("How the runs were made", rows, columns)


def _short(value: Any, key: str) -> str:
    if value is None:
        return NOTHING
    return str(value)[:_SHA_SHOWN] if key == "manifest_sha256" else str(value)
