"""What a page says in tables: figures with intervals, data, memory, provenance."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from umtrain.console import format_duration
from umtrain.report.record import Record, figure, throughput_unit
from umtrain.report.tables import mean_std
from umtrain.report.wording import NOTHING, SPLIT_NAMES, estimate, interval, number, percent
from umtrain.units import format_bytes

_SPLITS = ("train", "val", "test")
_WITHIN_MM = ("2", "2.5", "3", "4", "5")


class Link(NamedTuple):
    """A cell that leads somewhere."""

    text: str
    href: str


Cell = str | Link


@dataclass(frozen=True)
class TextTable:
    """A table of a page; the first cell of a row is its heading. No columns: name and value."""

    caption: str
    rows: list[tuple[Cell, ...]]
    columns: tuple[str, ...] = ()


Section = dict[str, Any]
_Teller = Callable[[Section], str]


def quality_tables(record: Record) -> list[TextTable]:
    """Return the figures of merit of every evaluated split, test first."""
    splits = [split for split in ("test", "val") if record[split]]
    if not splits:
        return []
    tellers = _TELLERS[record["dataset"]]
    rows: list[tuple[Cell, ...]] = [
        (name, *(_told(tell, record[split]) for split in splits)) for name, tell in tellers.items()
    ]
    columns = ("", *(SPLIT_NAMES[split] for split in splits))
    tables = [TextTable("With 95% confidence intervals in brackets", rows, columns)]
    if record["dataset"] == "spine":
        tables += [
            _success_table(record, split) for split in splits if record[split].get("success")
        ]
    return tables


def _told(tell: _Teller, section: Section) -> str:
    try:
        return tell(section)
    except (KeyError, TypeError):  # not in this record; the page says why below
        return NOTHING


def _with_interval(key: str, digits: int) -> _Teller:
    stem = key.removesuffix("_mm")
    ci = f"{stem}_ci_mm" if key.endswith("_mm") else f"{key}_ci"
    return lambda section: estimate(section[key], section.get(ci), digits)


def _threshold(section: Section) -> str:
    chosen = section.get("threshold_from")
    return number(section["threshold"], 3) + (f", {chosen}" if chosen else "")


def _counts(one: str, other: str) -> _Teller:
    return lambda section: f"{section['confusion'][one]} / {section['confusion'][other]}"


def _by_class(section: Section) -> str:
    if section.get("n_pos") is None:
        return str(section["n"])
    return f"{section['n']} ({section['n_pos']} positive, {section['n_neg']} negative)"


def _mean_and_median(key: str) -> _Teller:
    return lambda section: f"{number(section[key]['mean'])}, {number(section[key]['median'])}"


def _agreement(name: str) -> _Teller:
    return lambda section: estimate(
        section["bland_altman"][f"{name}_mm"], section["bland_altman"].get(f"{name}_ci_mm")
    )


_COMMON: dict[str, _Teller] = {
    "Loss": lambda section: number(section["loss"], 4),
    "Precision, device": lambda section: f"{section['precision']}, {section['device']}",
}
_CLASSIFIED: dict[str, _Teller] = {
    "Patients": lambda section: str(section["n_patients"]),
    "AUC": _with_interval("auc", 3),
    "Method of its interval": lambda section: str(section["auc_ci_method"]),
    "AUC, by bootstrap": lambda s: interval(s["auc_ci_bootstrap"], 3),
    "Average precision": _with_interval("average_precision", 3),
    "Threshold": _threshold,
    "Sensitivity": _with_interval("sensitivity", 3),
    "Specificity": _with_interval("specificity", 3),
    "Accuracy": _with_interval("accuracy", 3),
    "True / false positives": _counts("tp", "fp"),
    "True / false negatives": _counts("tn", "fn"),
    "Brier score": lambda section: number(section["brier"], 3),
    **_COMMON,
}
_SPINE: dict[str, _Teller] = {
    "Radiographs": lambda section: str(section["n"]),
    "SVA error, mean, mm": _with_interval("mae_mm", 2),
    "SVA error, median, mm": _with_interval("median_ae_mm", 2),
    "Bias, mm": _agreement("bias"),
    "Lower limit of agreement, mm": _agreement("lower"),
    "Upper limit of agreement, mm": _agreement("upper"),
    "ICC": lambda section: estimate(section["icc"]["value"], section["icc"].get("ci"), 3),
    "Kind of ICC": lambda section: str(section["icc"]["kind"]),
    "C7 distance, mean, median, mm": _mean_and_median("c7_radial_mm"),
    "S1 distance, mean, median, mm": _mean_and_median("s1_radial_mm"),
    **_COMMON,
}
_TELLERS: dict[str, dict[str, _Teller]] = {
    "wsi": {"Slides": _by_class, **_CLASSIFIED},
    "ct": {"Volumes": _by_class, **_CLASSIFIED},
    "spine": _SPINE,
}


def _success_table(record: Record, split: str) -> TextTable:
    success = record[split]["success"]
    rows: list[tuple[Cell, ...]] = [
        (name, *(percent((success.get(point) or {}).get(mm)) for mm in _WITHIN_MM))
        for point, name in (("c7", "C7"), ("s1", "S1"))
    ]
    columns = ("", *(f"{mm} mm" for mm in _WITHIN_MM))
    return TextTable(
        f"Keypoints within a distance of the truth, {SPLIT_NAMES[split]}", rows, columns
    )


def data_tables(record: Record, spacing_mm: tuple[float, float] | None) -> list[TextTable]:
    """Return counts by split, and what is known about the images; `spacing_mm` is their range."""
    data = record["data"]
    counts: list[tuple[Cell, ...]] = [
        (SPLIT_NAMES[split], _count(data.get(f"n_{split}")), _n_patients(record, split))
        for split in _SPLITS
    ]
    facts: list[tuple[Cell, ...]] = [
        ("Manifest", str(data.get("manifest"))),
        ("SHA-256 of the manifest", str(data.get("manifest_sha256") or NOTHING)),
        ("Patients in two splits", "none: such a manifest is refused"),
    ]
    named = {
        "positive": "Positive label",
        "n_facing_unstated": "Side faced not stated (as right)",
        "grid": "Grid of the network",
        "window": "Window, where a volume has none of its own",
    }
    facts += [(name, str(data[key])) for key, name in named.items() if key in data]
    facts += [(name, _range(data[key])) for key, name in _SCALES.items() if data.get(key)]
    if spacing_mm is not None:
        facts.append(("Spacing of evaluated images, mm/px", _span(*spacing_mm)))
    skipped = data.get("skipped") or []
    facts.append(("Left out", str(len(skipped)) if skipped else "none"))
    tables = [
        TextTable("Images and patients by split", counts, ("", "images", "patients")),
        TextTable("Source", facts),
    ]
    return [*tables, _skipped_table(skipped)] if skipped else tables


_SCALES = {"mpp": "Microns per pixel", "mm_per_px": "Spacing, mm/px"}


def _n_patients(record: Record, split: str) -> str:
    known = figure(record, f"data.n_patients.{split}")
    return _count(figure(record, f"{split}.n_patients") if known is None else known)


def _count(n: int | None) -> str:
    return NOTHING if n is None else str(n)


def _range(scale: Any) -> str:
    if not isinstance(scale, dict):
        return str(scale)
    if scale.get("min") is None:
        return NOTHING
    text = _span(scale["min"], scale["max"])
    unstated = scale.get("n_unstated")
    return f"{text}; not stated for {unstated}" if unstated else text


def _span(low: float, high: float) -> str:
    return number(low, 4) if low == high else interval((low, high), 4)


def _skipped_table(skipped: list[Any]) -> TextTable:
    rows: list[tuple[Cell, ...]] = []
    for item in skipped:
        if isinstance(item, dict):
            name = item.get("id", item.get("path", item.get("row", NOTHING)))
            rows.append((str(name), str(item.get("reason", NOTHING))))
        else:
            rows.append((str(item), NOTHING))
    return TextTable("Images left out, and why", rows, ("image", "reason"))


_BYTES = {
    "device_peak_bytes": "Device memory, peak",
    "host_peak_bytes": "Host memory, peak",
    "rss_peak_bytes": "Process memory, peak",
    "swapped_out_bytes": "Swapped out in a step",
    "swapped_in_bytes": "Swapped in in a step",
}
_OTHERS = {
    "major_faults": "Major page faults in a step",
    "stall_s": "Waiting for memory in a step, s",
    "prefetch_hits": "Prefetches in time",
    "prefetch_late": "Prefetches late",
}


def memory_table(record: Record) -> TextTable:
    """Return what training did to memory; why, where a figure could not be had."""
    use = record["memory_use"] or {}
    running = use.get("strategy")
    strategy = str(record["memory"])
    if running and running != strategy:
        strategy += f", which chose {running}"
    rows: list[tuple[Cell, ...]] = [("Strategy", strategy)]
    for key, name in (_BYTES | _OTHERS).items():
        value = use.get(key)
        if value is None:
            why = record["reasons"].get(f"memory_use.{key}") or record["reasons"].get("memory_use")
            if key in use or why:
                rows.append((name, f"{NOTHING} ({why})" if why else NOTHING))
        else:
            text = format_bytes(value) if key in _BYTES else f"{value:.3g}"
            rows.append((name, text))
    return TextTable("Memory of training", rows)


def time_table(record: Record) -> TextTable:
    """Return how fast training was and how long the run took."""
    images = figure(record, "throughput.images_per_s")
    n_steps = figure(record, "throughput.step_s.n")
    took_s = record.get("elapsed_s")
    rows: list[tuple[Cell, ...]] = [
        (f"Training {throughput_unit(record)}/s", mean_std(images)),
        ("A step, s", mean_std(figure(record, "throughput.step_s"), 3)),
        ("Steps measured, warm-up left out", _count(n_steps)),
        ("Steps, epochs trained", f"{_train(record, 'steps')}, {_train(record, 'epochs')}"),
        ("Best epoch", _train(record, "best_epoch")),
        ("The whole run", NOTHING if took_s is None else format_duration(took_s)),
    ]
    if resumed := figure(record, "train.resumed_after_steps"):
        rows.append(("Interrupted, and gone on with after step", ", ".join(map(str, resumed))))
    if left_out := figure(record, "train.steps_left_out"):
        rows.append(("Steps without an update, as the loss was no number", _count(len(left_out))))
    return TextTable("Time; mean ± standard deviation over steps", rows)


def _train(record: Record, key: str) -> str:
    return _count(figure(record, f"train.{key}"))


def provenance_table(run_dir: Path, record: Record) -> TextTable:
    """Return what the run was: settings, machine, versions, source revision."""
    environment = record["environment"]
    rows: list[tuple[Cell, ...]] = [
        ("Run directory", run_dir.resolve().name),
        ("Started", started_at(record)),
        ("Command", f"umtrain {record.get('command', 'fit')}"),
        ("Dataset, model", f"{record['dataset']}, {record['model']}"),
        *((("Approach", str(record["approach"])),) if record.get("approach") else ()),
        ("Resolution, batch", f"{record['res']}, {record.get('batch_size', NOTHING)}"),
        *((key.capitalize(), str(record[key])) for key in ("precision", "device", "seed")),
        ("Machine", str(environment.get("device_name"))),
        ("Platform", str(environment.get("platform"))),
        ("Source revision", str(environment.get("git") or NOTHING)),
    ]
    versions = environment.get("versions") or {}
    rows += [(name, str(value or "not installed")) for name, value in versions.items()]
    return TextTable("How this was made", rows)


def started_at(record: Record) -> str:
    """Return when the run began, to the minute, in UTC."""
    return f"{datetime.fromtimestamp(record['started_at_s'], UTC):%Y-%m-%d %H:%M} UTC"
