"""Runs, a sweep and a comparison as they lie on disk, with figures from the real evaluation."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from umtrain.evaluation.classification import classification_evidence
from umtrain.evaluation.keypoints import keypoint_evidence, sva_mm


def record(**changes):
    """A record of a run on slides as an older umtrain wrote it."""
    return {
        "status": "ok",
        "command": "fit",
        "started_at_s": 1.7e9,
        "dataset": "wsi",
        "model": "resnet50",
        "res": 512,
        "batch_size": 1,
        "memory": "vanilla",
        "precision": "bf16",
        "device": "cpu",
        "seed": 0,
        "throughput": {
            "images_per_s": {"mean": 2.5, "std": 0.25, "n": 9},
            "step_s": {"mean": 0.4, "std": 0.04, "n": 9},
        },
        "memory_use": {
            "strategy": "vanilla",
            "device_peak_bytes": 2**30,
            "host_peak_bytes": None,
            "rss_peak_bytes": 2**31,
            "swapped_out_bytes": 0,
            "major_faults": 3,
            "stall_s": 0.0,
        },
        "train": {
            "steps": 8,
            "epochs": 2,
            "best_epoch": 2,
            "validations": [
                {"epoch": 1, "loss": 0.6, "auc": 0.7},
                {"epoch": 2, "loss": 0.5, "auc": 0.8},
            ],
        },
        "val": None,
        "test": {"n": 4, "auc": 0.75, "auc_ci": [0.2, 0.97], "accuracy": 0.5},
        "environment": {
            "device_name": "a processor",
            "platform": "Linux",
            "git": None,
            "versions": {"umtrain": "0.1.0", "torch": "2.13.0", "cupy-cuda13x": None},
        },
        "data": {
            "manifest": "slides.csv",
            "manifest_sha256": "ab" * 32,
            "n_train": 156,
            "n_val": 24,
            "n_test": 4,
            "positive": "tumour",
            "skipped": [],
        },
        "reasons": {"memory_use.host_peak_bytes": "no second tier in use"},
        "elapsed_s": 442.0,
        **changes,
    }


def slide_predictions(n, seed, skill=1.5, truth_seed=0):
    """Rows of predictions.csv of n test slides; the seed is that of the model's errors."""
    labels = np.random.default_rng(truth_seed).permutation(np.arange(n) % 2)
    noise = np.random.default_rng(seed + 1).normal(0, 1.2, n)
    probs = 1 / (1 + np.exp(-(skill * (2 * labels - 1) + noise)))
    return [
        {"id": f"slide_{i:04d}", "split": "test", "label": int(labels[i]), "prob": float(probs[i])}
        for i in range(n)
    ]


def slide_section(rows, **changes):
    """The record's section on those rows."""
    labels, probs = [row["label"] for row in rows], [row["prob"] for row in rows]
    evidence = classification_evidence(
        labels, probs, np.arange(len(rows)), 0.41, "chosen on the validation split"
    )
    own = {"loss": 0.45, "n": len(rows), "precision": "bf16", "device": "cpu"}
    return own | evidence | changes


def film_predictions(n, seed, spread_mm=2.0):
    """Rows of predictions.csv of n test radiographs."""
    truth, errors = np.random.default_rng(0), np.random.default_rng(seed + 1)
    rows = []
    for i in range(n):
        spacing = np.array([0.15, 0.14])  # row, column
        true = np.array([[900 + truth.normal(0, 250), 400], [900 + truth.normal(0, 60), 2600]])
        pred = true + errors.normal(0, spread_mm, (2, 2)) / spacing[::-1]
        sva = [
            float(sva_mm(xy[None, 0], xy[None, 1], [spacing[1]], ["right"])[0])
            for xy in (true, pred)
        ]
        rows.append(
            {
                "id": f"film_{i:04d}",
                "split": "test",
                **{
                    f"{point}_{axis}_{kind}": float(xy[p, a])
                    for kind, xy in (("true", true), ("pred", pred))
                    for p, point in enumerate(("c7", "s1"))
                    for a, axis in enumerate("xy")
                },
                "sva_true_mm": sva[0],
                "sva_pred_mm": sva[1],
                "mm_per_px": float(spacing[1]),
                "row_mm_per_px": float(spacing[0]),
                "facing": "right",
            }
        )
    return rows


def film_section(rows, **changes):
    """The record's section on those rows."""
    true, pred = (
        [[[row[f"{p}_{a}_{kind}"] for a in "xy"] for p in ("c7", "s1")] for row in rows]
        for kind in ("true", "pred")
    )
    spacing = [[row["row_mm_per_px"], row["mm_per_px"]] for row in rows]
    evidence = keypoint_evidence(true, pred, spacing, [row["facing"] for row in rows])
    own = {"loss": 3.1, "n": len(rows), "precision": "bf16", "device": "cpu"}
    return own | evidence | changes


def write_run(run_dir, record, rows, n_cases=0, side_px=(96, 48)):
    """Write a run's files into `run_dir`, cases of its first rows with pictures among them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    cases = []
    for row in rows[:n_cases]:
        picture = run_dir / "cases" / f"test-{row['id']}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", side_px, (196, 120, 168)).save(picture)
        name = f"cases/{picture.name}"
        cases.append({"id": row["id"], "picture": name, "caption": "the worst false negative"})
    if n_cases:
        record = {**record, "test": {**record["test"], "cases": cases}}
    (run_dir / "metrics.json").write_text(json.dumps(record))
    (run_dir / "config.yaml").write_text(f"res: {record['res']}\nseed: 0\n")
    with (run_dir / "predictions.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    losses = [0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.45, 0.4]
    lines = [f"{i},{1 + (i > 4)},{loss}" for i, loss in enumerate(losses, 1)]
    (run_dir / "steps.csv").write_text("\n".join(["step,epoch,loss", *lines, ""]))
    return run_dir


class Runs:
    """Makes runs on disk; a fixture, as test modules do not import each other."""

    record = staticmethod(record)
    slide_predictions = staticmethod(slide_predictions)
    slide_section = staticmethod(slide_section)
    film_predictions = staticmethod(film_predictions)
    film_section = staticmethod(film_section)
    write = staticmethod(write_run)

    @staticmethod
    def slides(run_dir, seed=0, n=60, n_cases=3, skill=1.5, **changes):
        """Write a run on slides."""
        rows = slide_predictions(n, seed, skill)
        whole = record(seed=seed, test=slide_section(rows), **changes)
        return write_run(run_dir, whole, rows, n_cases)

    @staticmethod
    def films(run_dir, seed=0, n=34, n_cases=3, spread_mm=2.0, **changes):
        """Write a run on radiographs."""
        rows = film_predictions(n, seed, spread_mm)
        counts = {"n_train": 286, "n_val": 40, "n_test": n, "n_facing_unstated": 0}
        source = {"manifest": "films.csv", "manifest_sha256": "cd" * 32, "skipped": []}
        choices = {"dataset": "spine", "model": "resunet35", "data": source | counts}
        whole = record(seed=seed, test=film_section(rows), **{**choices, **changes})
        return write_run(run_dir, whole, rows, n_cases)

    @staticmethod
    def sweep(folder):
        """Write a sweep of two resolutions and two strategies, one job of it out of memory."""
        records = []
        for i, (res, memory) in enumerate(
            (res, memory) for res in (256, 512, 1024) for memory in ("vanilla", "stream")
        ):
            axes = {"res": str(res), "memory": memory}
            rows = slide_predictions(60, i, 0.3 + i / 3)
            job = record(res=res, memory=memory, test=slide_section(rows))
            job["throughput"]["images_per_s"] = {"mean": 2e3 / res, "std": 40 / res, "n": 9}
            job["memory_use"] = {"rss_peak_bytes": res * 2**21, "device_peak_bytes": res * 2**20}
            if (res, memory) == (1024, "vanilla"):
                job |= {"status": "oom", "test": None, "throughput": None, "memory_use": None}
                job["reasons"] = {"status": "2 GiB are too little; memory=stream fits"}
            write_run(folder / f"res-{res}_memory-{memory}", job, rows)
            records.append({**job, "axes": axes})
        (folder / "summary.json").write_text(json.dumps(records))
        return folder


@pytest.fixture(scope="session")
def runs():
    """Makers of runs and sweeps."""
    return Runs
