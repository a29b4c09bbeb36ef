"""Why a figure is not there: the record's own words, or that the record is an older one."""

from typing import Any

from umtrain.report.record import Record

_CLASSIFICATION_KEYS = (
    *("auc", "average_precision", "accuracy", "threshold", "sensitivity", "specificity"),
    *("confusion", "brier", "calibration", "curves", "cases"),
)
SECTION_KEYS = {
    "wsi": _CLASSIFICATION_KEYS,
    "ct": _CLASSIFICATION_KEYS,
    "spine": (
        *("mae_mm", "mae_ci_mm", "median_ae_mm", "c7_radial_mm", "s1_radial_mm"),
        *("bland_altman", "icc", "success", "cases"),
    ),
}


def why_absent(section: dict[str, Any], key: str, split: str) -> str:
    """Return why `section`, the record's part on `split`, has no value at `key`."""
    for name in (f"{key}_reason", f"{key.removesuffix('_mm')}_reason"):
        if section.get(name):
            return str(section[name])
    if key not in section:
        return (
            "the record was written by an umtrain that did not keep this yet; "
            f"`umtrain eval split={split}` on the run adds it"
        )
    return "the record gives no reason"


def all_reasons(record: Record) -> dict[str, str]:
    """Return every figure that could not be had, by its dotted key, with why."""
    found = {str(key): str(reason) for key, reason in record["reasons"].items()}
    for split in ("test", "val"):
        section = record[split]
        if not section:
            continue
        found |= _beside_figures(section, split)
        for key in SECTION_KEYS.get(record["dataset"], ()):
            if key not in section:
                found.setdefault(f"{split}.{key}", why_absent(section, key, split))
    return found


def _beside_figures(section: dict[str, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            found |= _beside_figures(value, f"{prefix}.{key}")
        elif key.endswith("_reason") and value:
            found[f"{prefix}.{key.removesuffix('_reason')}"] = str(value)
    return found
