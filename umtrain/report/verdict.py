"""The first line of a page: what was found, in words and with its interval."""

from dataclasses import dataclass
from typing import Any

from umtrain.report.reasons import why_absent
from umtrain.report.record import Record, figure
from umtrain.report.wording import (
    SPLIT_NAMES,
    estimate,
    images,
    interval,
    number,
    p_value,
    percent,
)

_WITHIN_MM = "3"
_ALPHA = 0.05
_HEADLINES = {
    "wsi": ("auc", "AUC", ""),
    "ct": ("auc", "AUC", ""),
    "spine": ("mae_mm", "mean SVA error", " mm"),
}


@dataclass(frozen=True)
class Verdict:
    """One line, and what a reader must know before believing it."""

    line: str
    cautions: tuple[str, ...] = ()


def run_verdict(record: Record) -> Verdict:
    """Return what a run found, on its test split or else on validation."""
    if record["status"] != "ok":
        why = record["reasons"].get("status", "the record gives no reason")
        return Verdict(f"This run ended as {record['status']}: {why}")
    split = evaluated_split(record)
    if split is None:
        return Verdict("Trained; the manifest has no validation or test images.")
    section = record[split]
    tell = _spine if record["dataset"] == "spine" else _classified
    found, cautions = tell(section, split)
    on = f"On {images(record['dataset'], section['n'], SPLIT_NAMES[split])}: "
    if split == "val":
        cautions.append("The best weights were chosen on these images: expect less on new ones.")
    return Verdict(f"{on}{found}.", tuple(cautions))


def evaluated_split(record: Record) -> str | None:
    """Return the split that a page is about: test if it was evaluated, else val."""
    return next((split for split in ("test", "val") if record[split]), None)


def _classified(section: dict[str, Any], split: str) -> tuple[str, list[str]]:
    if section.get("auc") is None:
        return f"no AUC ({why_absent(section, 'auc', split)})", []
    found = f"AUC {_auc(section)}"
    if section.get("sensitivity") is not None and section.get("specificity") is not None:
        chosen = f" ({section['threshold_from']})" if section.get("threshold_from") else ""
        found += (
            f"; sensitivity {estimate(section['sensitivity'], section.get('sensitivity_ci'))}"
            f" and specificity {estimate(section['specificity'], section.get('specificity_ci'))}"
            f" at the threshold {number(section.get('threshold'))}{chosen}"
        )
    bounds = section.get("auc_ci")
    if bounds and bounds[0] <= 0.5:
        return found, ["The AUC's interval includes 0.5, which is chance."]
    return found, []


def _auc(section: dict[str, Any]) -> str:
    bounds = section.get("auc_ci")
    if bounds is None:
        return number(section["auc"])
    return f"{number(section['auc'])} (95% CI {interval(bounds)})"


def _spine(section: dict[str, Any], split: str) -> tuple[str, list[str]]:
    if section.get("mae_mm") is None:
        return f"no SVA error ({why_absent(section, 'mae_mm', split)})", []
    bounds = section.get("mae_ci_mm")
    brackets = f" (95% CI {interval(bounds)})" if bounds else ""
    found = f"SVA is off by {number(section['mae_mm'])} mm on average{brackets}"
    agreement = section.get("bland_altman")
    if agreement and agreement.get("lower_mm") is not None:
        limits = (agreement["lower_mm"], agreement["upper_mm"])
        found += (
            f"; bias {number(agreement['bias_mm'])} mm, "
            f"limits of agreement {interval(limits, 1)} mm"
        )
    within = {
        name: figure(section, f"success.{key}.{_WITHIN_MM}")
        for key, name in (("c7", "C7"), ("s1", "S1"))
    }
    if all(share is not None for share in within.values()):
        told = " and ".join(f"{name} in {percent(share)}" for name, share in within.items())
        found += f"; within {_WITHIN_MM} mm of the truth: {told}"
    return found, []


def sweep_verdict(records: list[Record]) -> Verdict:
    """Return how many jobs ran, and which of them was best and worst at its task."""
    counts = {
        words: sum(record["status"] == status for record in records)
        for status, words in (
            ("ok", "finished"),
            ("oom", "ran out of memory"),
            ("failed", "failed"),
            ("interrupted", "interrupted"),
        )
    }
    told = ", ".join(f"{n} {words}" for words, n in counts.items() if n)
    line = f"{len(records)} {'job' if len(records) == 1 else 'jobs'}: {told}."
    cautions: list[str] = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        rest, more = _extremes([r for r in records if r["dataset"] == dataset], dataset)
        line += rest
        cautions += more
    return Verdict(line, tuple(cautions))


def _extremes(records: list[Record], dataset: str) -> tuple[str, list[str]]:
    key, name, unit = _HEADLINES[dataset]
    known = [record for record in records if figure(record, f"test.{key}") is not None]
    if not known:
        return "", []
    ranked = sorted(known, key=lambda r: float(figure(r, f"test.{key}")), reverse=key == "auc")
    best, worst = ranked[0], ranked[-1]
    line = f" Best test {name}: {_at(best, key, unit)}"
    if len(ranked) == 1:
        return f"{line}.", []
    line += f"; worst: {_at(worst, key, unit)}."
    one, other = (_bounds(record, key) for record in (best, worst))
    if one and other and _overlap(one, other):
        return line, [f"The intervals of best and worst {name} overlap: this settles nothing."]
    return line, [f"The best of {len(known)} is picked by its test figure: expect less of it."]


def _at(record: Record, key: str, unit: str) -> str:
    point = ", ".join(f"{axis}={value}" for axis, value in record["axes"].items())
    return f"{estimate(figure(record, f'test.{key}'), _bounds(record, key))}{unit} at {point}"


def _bounds(record: Record, key: str) -> list[float] | None:
    bounds: list[float] | None = figure(record, f"test.{_ci_key(key)}")
    return bounds


def _overlap(one: list[float], other: list[float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def comparison_verdict(comparison: dict[str, Any]) -> Verdict:
    """Return how each run does on the shared images, and what the paired tests show."""
    dataset, split = comparison["dataset"], SPLIT_NAMES[comparison["split"]]
    n_images = images(dataset, comparison["n_shared"], split)
    key, name, unit = _HEADLINES[dataset]
    told = [
        f"{run['run']} {estimate(run['shared'].get(key), run['shared'].get(_ci_key(key)))}{unit}"
        for run in comparison["runs"]
    ]
    tests = [difference_words(test, dataset) for test in comparison["tests"]]
    line = f"On the same {n_images}, {name}: {', '.join(told)}. {'. '.join(tests)}."
    return Verdict(line, tuple(comparison["cautions"]))


def difference_words(test: dict[str, Any], dataset: str) -> str:
    """Return one paired test in words: the difference, its interval, p and what it shows."""
    key, _, unit = _HEADLINES[dataset]
    suffix = "_mm" if key.endswith("_mm") else ""
    who = f"{test['run']} − {test['against']}"
    value, bounds = test.get(f"difference{suffix}"), test.get(f"ci{suffix}")
    if value is None:
        return f"{who}: no test ({test.get(f'difference{suffix}_reason', 'no reason given')})"
    told = f"{who}: {'+' if value > 0 else ''}{number(value)}{unit}"
    if bounds is None:
        why = test.get(f"ci{suffix}_reason", "no reason given")
        return f"{told}, without an interval ({why})"
    p = f", {p_value(test['p'])}" if test.get("p") is not None else ""
    return f"{told} (95% CI {interval(bounds)}{p}): {shown_by(test, dataset)}"


def shown_by(test: dict[str, Any], dataset: str) -> str:
    """Return what a paired test shows: which run is better, or that this is not settled."""
    lower_is_better = dataset == "spine"
    bounds = test.get("ci_mm" if lower_is_better else "ci")
    if bounds is None:
        return "nothing: there is no interval"
    excludes_zero = not bounds[0] <= 0 <= bounds[1]
    if test.get("p") is not None and (test["p"] < _ALPHA) != excludes_zero:
        return "interval and p disagree: not settled"
    if not excludes_zero:
        return "no difference shown"
    better = (bounds[0] > 0) != lower_is_better
    return f"{test['run']} is {'better' if better else 'worse'}"


def _ci_key(key: str) -> str:
    return "mae_ci_mm" if key == "mae_mm" else f"{key}_ci"
