"""Several runs on the images that they share: paired tests, pictures, one page."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from sklearn.metrics import average_precision_score

from umtrain.console import Console
from umtrain.data.manifest import Kind, read_manifest
from umtrain.errors import RunError, UmtrainError
from umtrain.evaluation.classification import roc_auc
from umtrain.evaluation.comparison import paired_auc_test, paired_error_test
from umtrain.evaluation.keypoints import keypoint_evidence
from umtrain.files import write_json
from umtrain.report.comparison_page import write_comparison_page
from umtrain.report.facts import started_at
from umtrain.report.record import RECORD_NAME, Record, figure, read_record
from umtrain.report.verdict import comparison_verdict
from umtrain.run_dir import RUNS, read_predictions, read_run_config
from umtrain.sweep import SUMMARY_NAME

COMPARISON_NAME = "comparison.json"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SAME_SVA_MM = 0.05
_POINTS, _AXES = ("c7", "s1"), ("x", "y")

Row = dict[str, Any]
Patients = list[str] | None


class Run(NamedTuple):
    """A run as it is compared: its letter, where it is, its record and its predictions by id."""

    letter: str
    run_dir: Path
    record: Record
    predictions: dict[str, dict[str, Row]]


def compare(run_dirs: list[Path], out: Path | None, console: Console) -> Path:
    """Compare runs on the images that all of them have predictions for; return the folder written.

    The first run is what the others are tested against. Writes comparison.json, pictures and
    report.html into `out` (null: runs/comparison-…). Raises RunError if the runs cannot be
    compared: of different datasets, without shared images, or with other truths for one image.
    """
    _check_out(out)
    runs = _read_runs(run_dirs)
    split = _common_split(runs)
    ids = _shared_ids(runs, split)
    spine = runs[0].record["dataset"] == "spine"
    _check_truths(runs, split, ids, "sva_true_mm" if spine else "label")
    comparison = _comparison(runs, split, ids)
    folder = out or RUNS / _folder_name(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"out={folder}: cannot be made ({error.strerror}); name a folder") from error
    write_json(folder / COMPARISON_NAME, comparison)
    page = write_comparison_page(folder, comparison)
    verdict = comparison_verdict(comparison)
    for run in comparison["runs"]:
        console.say(f"{run['run']}        {run['run_dir']}")
    for line in (verdict.line, *verdict.cautions):
        console.say(line)
    console.say(f"report   {page}")
    return folder


def _check_out(out: Path | None) -> None:
    """Raise RunError for a folder whose own report.html a comparison would replace."""
    for name in (RECORD_NAME, SUMMARY_NAME):
        if out is not None and (out / name).exists():
            raise RunError(f"out={out} is a run or a sweep, which has {name}; name a new folder")


def _folder_name(runs: list[Run]) -> str:
    names = "-".join(re.sub(r"[^\w.-]", "-", run.run_dir.resolve().name)[:24] for run in runs[:3])
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return f"comparison-{stamp}-{names}"


def _read_runs(run_dirs: list[Path]) -> list[Run]:
    if len(run_dirs) > len(_LETTERS):
        raise RunError(f"{len(run_dirs)} runs: compare at most {len(_LETTERS)} at a time")
    seen: set[Path] = set()
    runs: list[Run] = []
    for letter, run_dir in zip(_LETTERS, run_dirs, strict=False):
        if run_dir.resolve() in seen:
            raise RunError(f"{run_dir} is named twice; name each run once")
        seen.add(run_dir.resolve())
        record = read_record(run_dir)
        if runs and record["dataset"] != runs[0].record["dataset"]:
            raise RunError(
                f"{run_dir} is a run on dataset={record['dataset']}, {runs[0].run_dir} one on "
                f"dataset={runs[0].record['dataset']}; compare runs on the same images"
            )
        predictions: dict[str, dict[str, Row]] = {}
        for row in read_predictions(run_dir):
            predictions.setdefault(row["split"], {})[row["id"]] = row
        runs.append(Run(letter, run_dir, record, predictions))
    return runs


def _common_split(runs: list[Run]) -> str:
    for split in ("test", "val"):
        if all(split in run.predictions for run in runs):
            return split
    told = "\n".join(
        f"  {run.run_dir}: {', '.join(sorted(run.predictions)) or 'none'}" for run in runs
    )
    raise RunError(
        f"no split that all runs have predictions for; they have\n{told}\n"
        "`umtrain eval run=DIR split=test` adds them"
    )


def _shared_ids(runs: list[Run], split: str) -> list[str]:
    first = runs[0]
    ids = [
        image
        for image in first.predictions[split]
        if all(image in run.predictions[split] for run in runs[1:])
    ]
    if ids:
        return ids
    told = "\n".join(
        f"  {run.run_dir}: {', '.join(list(run.predictions[split])[:3])}, …" for run in runs
    )
    raise RunError(
        f"no image of split {split} is in all runs; their ids start with\n{told}\n"
        "Compare runs that were evaluated with the same manifest"
    )


def _check_truths(runs: list[Run], split: str, ids: list[str], column: str) -> None:
    first = runs[0]
    tolerance = _SAME_SVA_MM if column == "sva_true_mm" else 0.0
    for run in runs[1:]:
        for image in ids:
            ours, theirs = (r.predictions[split][image][column] for r in (first, run))
            if abs(float(ours) - float(theirs)) > tolerance:
                raise RunError(
                    f"{image}: {column} is {ours} in {first.run_dir} and {theirs} in "
                    f"{run.run_dir}; a comparison needs one truth for each image. Evaluate both "
                    "with the same manifest (and, for slides, the same dataset.positive)"
                )


def _comparison(runs: list[Run], split: str, ids: list[str]) -> Record:
    dataset = runs[0].record["dataset"]
    describe, test, image = _SPINE if dataset == "spine" else _SLIDES
    rows = {run.letter: [run.predictions[split][name] for name in ids] for run in runs}
    first = runs[0].letter
    patients = _patients(runs[0], ids)
    images = [image([rows[run.letter][i] for run in runs]) for i in range(len(ids))]
    cases, cases_reason = _shared_cases(runs, split)
    return {
        "dataset": dataset,
        "split": split,
        "n_shared": len(ids),
        "runs": [
            {**_run_facts(run, runs, split), "shared": describe(rows[run.letter], patients)}
            for run in runs
        ],
        "tests": [
            {
                "run": run.letter,
                "against": first,
                **test(rows[run.letter], rows[first], patients),
            }
            for run in runs[1:]
        ],
        "images": sorted(images, key=lambda one: -float(one["spread"])),
        "cases": cases,
        "cases_reason": cases_reason,
        "cautions": [*_cautions(runs, split, len(ids)), *_of_patients(patients)],
    }


def _patients(run: Run, ids: list[str]) -> list[str] | None:
    """Return the patient of each image by the run's manifest; None if that is not there now."""
    try:
        dataset = read_run_config(run.run_dir, {}).dataset
        path, root = Path(str(dataset.manifest)), dataset.root
        manifest = read_manifest(path, cast(Kind, dataset.name), Path(root) if root else None)
    except UmtrainError:
        return None
    known = {record.id: record.patient_id for record in manifest.records}
    return [known[name] for name in ids] if all(name in known for name in ids) else None


def _of_patients(patients: list[str] | None) -> list[str]:
    if patients is not None:
        return []
    return ["The manifest is not there any more: each image counts as a patient of its own."]


def _run_facts(run: Run, runs: list[Run], split: str) -> Record:
    record = run.record
    names = [other.run_dir.resolve().name for other in runs]
    own = run.run_dir.resolve().name
    return {
        "run": run.letter,
        "name": own if names.count(own) == 1 else str(run.run_dir),
        "run_dir": str(run.run_dir),
        **{key: record[key] for key in ("model", "res", "memory", "precision", "device", "seed")},
        "approach": record.get("approach"),
        "n": len(run.predictions[split]),
        "elapsed_s": record.get("elapsed_s"),
        "throughput": record["throughput"],
        "memory_use": record["memory_use"],
        "annotation": record.get("annotation"),
        "machine": figure(record, "environment.device_name"),
        "manifest_sha256": figure(record, "data.manifest_sha256"),
        "git": figure(record, "environment.git"),
        "umtrain": figure(record, "environment.versions.umtrain"),
        "torch": figure(record, "environment.versions.torch"),
        "started_at": started_at(record),
    }


def _cautions(runs: list[Run], split: str, n_shared: int) -> list[str]:
    cautions = []
    if len({figure(run.record, "data.manifest_sha256") for run in runs}) > 1:
        cautions.append(
            "The runs used different manifests: make sure that no image tested here was one that "
            "another run trained on."
        )
    if any(len(run.predictions[split]) > n_shared for run in runs):
        told = ", ".join(f"{run.letter} {len(run.predictions[split])}" for run in runs)
        cautions.append(f"Images that not all runs have are left out; predictions: {told}.")
    if split == "val":
        cautions.append("The best weights were chosen on these images: expect less on new ones.")
    if len(runs) > 2:
        cautions.append(f"p is not corrected for the {len(runs) - 1} comparisons.")
    if len({figure(run.record, "environment.device_name") for run in runs}) > 1:
        cautions.append("The runs were on different machines: their times do not compare.")
    return cautions


def _shared_cases(runs: list[Run], split: str) -> tuple[list[Record], str | None]:
    """Return the cases that at least two runs have a picture of, or why there is none."""
    pictures: dict[str, list[Record]] = {}
    for run in runs:
        for case in figure(run.record, f"{split}.cases") or []:
            if case.get("picture"):
                one = {key: case.get(key) for key in ("picture", "caption")}
                pictures.setdefault(str(case["id"]), []).append({"run": run.letter, **one})
    shared = [{"id": name, "pictures": one} for name, one in pictures.items() if len(one) > 1]
    if shared:
        return shared, None
    without = [run.letter for run in runs if not figure(run.record, f"{split}.cases")]
    if without:
        return [], f"no case pictures in the record of {', '.join(without)}"
    return [], "no image has a picture in two of the runs: each keeps those of its worst cases"


def _labels(rows: list[Row]) -> list[int]:
    return [int(row["label"]) for row in rows]


def _probs(rows: list[Row]) -> list[float]:
    return [float(row["prob"]) for row in rows]


def _describe_slides(rows: list[Row], _: Patients) -> Record:
    labels, probs = _labels(rows), _probs(rows)
    if len(set(labels)) < 2:
        reason = "the shared images are all of one class"
        return {"auc": None, "auc_ci": None, "average_precision": None, "auc_reason": reason}
    found = roc_auc(labels, probs)
    return {
        "auc": found.auc,
        "auc_ci": list(found.ci),
        "auc_ci_method": found.ci_method,
        "average_precision": float(average_precision_score(labels, probs)),
    }


def _test_slides(rows: list[Row], first: list[Row], _: Patients) -> Record:
    return dict(paired_auc_test(_labels(rows), _probs(rows), _probs(first)))


def _slide(rows: list[Row]) -> Record:
    probs = _probs(rows)
    spread = max(probs) - min(probs)
    return {"id": rows[0]["id"], "label": int(rows[0]["label"]), "probs": probs, "spread": spread}


def _describe_spine(rows: list[Row], patients: Patients) -> Record:
    true, predicted = (
        [
            [[float(row[f"{point}_{axis}_{kind}"]) for axis in _AXES] for point in _POINTS]
            for row in rows
        ]
        for kind in ("true", "pred")
    )
    spacing_mm = [[float(row["row_mm_per_px"]), float(row["mm_per_px"])] for row in rows]
    facing = [row["facing"] for row in rows]
    found = dict(keypoint_evidence(true, predicted, spacing_mm, facing, patients))
    return found | {"n_patients": None if patients is None else found["n_patients"]}


def _test_spine(rows: list[Row], first: list[Row], patients: Patients) -> Record:
    return dict(paired_error_test(_errors_mm(rows), _errors_mm(first), patients))


def _errors_mm(rows: list[Row]) -> list[float]:
    differences = [float(row["sva_pred_mm"]) - float(row["sva_true_mm"]) for row in rows]
    return [float(error) for error in np.abs(differences)]


def _film(rows: list[Row]) -> Record:
    errors = _errors_mm(rows)
    return {
        "id": rows[0]["id"],
        "sva_true_mm": float(rows[0]["sva_true_mm"]),
        "sva_pred_mm": [float(row["sva_pred_mm"]) for row in rows],
        "spread": max(errors) - min(errors),
    }


_SLIDES = (_describe_slides, _test_slides, _slide)
_SPINE = (_describe_spine, _test_spine, _film)
