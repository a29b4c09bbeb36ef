"""`umtrain fit` and `umtrain eval` as a user runs them."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from umtrain import models
from umtrain.checkpoint import load_checkpoint
from umtrain.data.manifest import read_manifest
from umtrain.memory.options import Options
from umtrain.planning.predict import predict
from umtrain.planning.profile import load_profile
from umtrain.planning.subject import Subject

PICTURES = ("roc", "pr", "probabilities", "calibration", "confusion")
SMALL = ("model=resnet18", "res=64", "epochs=2", "dataset.workers=0", "precision=fp32")


@pytest.fixture(scope="module")
def finished_run(slides, umtrain, tmp_path_factory):
    """A whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("fit")
    done = umtrain("fit", *SMALL, f"dataset.manifest={slides}", "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_a_run_directory_holds_what_the_readme_names(finished_run):
    run_dir, _ = finished_run
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml",
        "metrics.json",
        "steps.csv",
        "predictions.csv",
        "checkpoints/best.pt",
        "checkpoints/step-00000004.pt",
        "checkpoints/step-00000008.pt",
        "report.html",
        "training.png",
        *(f"{name}_test.png" for name in PICTURES),
        *(path for path in names if path.startswith("cases/test-slide_")),
        "log.txt",
    }
    assert {path.suffix for path in (run_dir / "cases").iterdir()} == {".png", ".npy", ".geojson"}


def test_the_record_says_what_ran_and_what_came_of_it(finished_run):
    run_dir, _ = finished_run
    record = json.loads((run_dir / "metrics.json").read_text())
    assert (record["status"], record["command"], record["memory"]) == ("ok", "fit", "auto")
    assert (record["data"]["n_train"], record["data"]["n_val"], record["data"]["n_test"]) == (
        4,
        2,
        2,
    )
    assert record["train"]["steps"] == 8
    assert record["throughput"]["images_per_s"]["n"] == 8 - record["throughput"]["warmup_steps"]
    assert record["throughput"]["images_per_s"]["mean"] > 0
    assert record["memory_use"]["device_peak_bytes"] > 4 * 11_000_000  # ResNet-18's parameters
    assert 0 <= record["test"]["auc"] <= 1
    assert record["environment"]["versions"]["torch"]


def test_steps_and_predictions_are_one_line_each(finished_run):
    run_dir, _ = finished_run
    with (run_dir / "steps.csv").open() as stream:
        steps = list(csv.DictReader(stream))
    assert [int(step["step"]) for step in steps] == list(range(1, 9))
    with (run_dir / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "split", "label", "prob"]
    assert sorted(row["split"] for row in rows) == ["test", "test", "val", "val"]
    assert all(0 < float(row["prob"]) < 1 for row in rows)


def test_eval_gives_the_figures_that_fit_ended_with(finished_run, umtrain):
    run_dir, _ = finished_run
    before = json.loads((run_dir / "metrics.json").read_text())
    predictions = (run_dir / "predictions.csv").read_text().splitlines()
    done = umtrain("eval", "run=run", cwd=run_dir.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "metrics.json").read_text())["test"] == before["test"]
    after = (run_dir / "predictions.csv").read_text().splitlines()
    assert sorted(after) == sorted(predictions)
    assert "report   run/report.html" in done.stdout


def test_the_same_seed_gives_the_same_bits_whoever_reads_the_images(
    finished_run, slides, umtrain, tmp_path
):
    run_dir, _ = finished_run
    again = umtrain(
        "fit",
        *SMALL,
        "dataset.workers=1",
        f"dataset.manifest={slides}",
        "run_dir=run",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    first = load_checkpoint(run_dir / "checkpoints" / "step-00000008.pt")["model"]
    second = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000008.pt")["model"]
    assert all(first[name].equal(second[name]) for name in first)


def test_a_finished_run_is_not_run_again(finished_run, slides, umtrain):
    run_dir, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/*")}
    figures = json.loads((run_dir / "metrics.json").read_text())
    words = ("fit", *SMALL, f"dataset.manifest={slides}", "run_dir=run")
    done = umtrain(*words, cwd=run_dir.parent)
    assert done.returncode == 0, done.stderr
    assert "run is finished; nothing is left to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/*")} == before
    assert json.loads((run_dir / "metrics.json").read_text()) == figures


def test_a_run_goes_on_without_an_image_that_has_gone_meanwhile(
    finished_run, slides, umtrain, tmp_path
):
    shutil.copytree(finished_run[0], tmp_path / "run")
    shutil.copytree(slides.parent, tmp_path / "slides")
    manifest = tmp_path / "slides" / slides.name
    gone = read_manifest(manifest, "wsi").split("train")[0]
    gone.path.unlink()
    words = ("fit", *SMALL, f"dataset.manifest={manifest}", "run_dir=run")
    done = umtrain(*words, "resume=run/checkpoints/step-00000004.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [entry["id"] for entry in record["data"]["skipped"]] == [gone.id]
    assert record["train"]["steps"] == 8


def test_radiographs_train_to_an_error_in_mm(radiographs, umtrain, tmp_path):
    done = umtrain(
        "fit",
        "dataset=spine",
        "res=128",
        "epochs=1",
        "batch_size=2",
        f"dataset.manifest={radiographs}",
        "run_dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["test"]["mae_mm"] >= 0
    assert record["test"]["median_ae_mm"] >= 0
    with (tmp_path / "run" / "predictions.csv").open() as stream:
        row = next(csv.DictReader(stream))
    assert {"c7_x_true", "s1_y_pred", "sva_true_mm", "sva_pred_mm", "mm_per_px"} <= set(row)


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_bf16_is_refused_where_processors_compute_it_wrongly(
    command, radiographs, umtrain, tmp_path
):
    words = ("dataset=spine", "res=128", f"dataset.manifest={radiographs}", "precision=bf16")
    device = {"fit": "cpu", "plan": "generic_cpu"}[command]
    done = umtrain(command, *words, f"device={device}", cwd=tmp_path)
    assert done.returncode == 2
    assert "resunet35 makes such a map of 64 columns" in done.stderr
    assert "use precision=fp32" in done.stderr
    assert not list(tmp_path.iterdir())


def _rewritten(slides, target, **changes):
    """Write the slides' manifest to `target`, cells changed by `column=function(value)`."""
    with slides.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row |= {"path": str(slides.parent / row["path"]), "mask": ""}
        row |= {column: change(row[column]) for column, change in changes.items()}
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def test_a_missing_file_is_noticed_before_training(slides, umtrain, tmp_path):
    manifest = _rewritten(
        slides, tmp_path / "m.csv", path=lambda path: path.replace("slide_0007", "gone")
    )
    done = umtrain("fit", *SMALL, f"dataset.manifest={manifest}", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 of 8 files are missing:\n  row 9:" in done.stderr
    assert "gone.tif" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_validation_images_the_last_epoch_counts(slides, umtrain, tmp_path):
    manifest = _rewritten(
        slides, tmp_path / "m.csv", split=lambda split: split.replace("val", "train")
    )
    done = umtrain(
        *("fit", "model=resnet18", "res=64", "epochs=2", "max_steps=7", "dataset.workers=0"),
        *("optim.accumulate=2", "batch_size=2", f"dataset.manifest={manifest}", "run_dir=run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "no validation images" in done.stdout
    assert "nan" not in done.stdout
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["val"] is None
    assert "no rows of split val" in record["reasons"]["val"]
    assert record["train"]["best_epoch"] == 2


def test_eval_refuses_another_manifest(finished_run, slides, umtrain, tmp_path):
    run_dir, _ = finished_run
    before = (run_dir / "metrics.json").read_bytes()
    other = _rewritten(slides, tmp_path / "m.csv", label=lambda label: f"class {label}")
    done = umtrain("eval", f"run={run_dir}", f"dataset.manifest={other}", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not the manifest that" in done.stderr
    assert (run_dir / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.yaml", b""), ("config.yaml", b"[1]"), ("checkpoints/best.pt", b"\x80junk")],
)
def test_a_damaged_run_is_named_by_its_file(finished_run, umtrain, tmp_path, name, content):
    run_dir, _ = finished_run
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / name).write_bytes(content)
    done = umtrain("eval", "run=run", cwd=tmp_path)
    assert done.returncode == 2
    assert f"run/{name}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_manifest_ends_before_anything_is_written(umtrain, tmp_path):
    (tmp_path / "slides.csv").write_text("slide_id,patient_id,path,label\ns,p,x.tif,1\n")
    done = umtrain("fit", "dataset.manifest=slides.csv", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "split" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def least_budget_bytes():
    """What vanilla is predicted to need at res=256 in fp32."""
    model = models.create("resnet50", in_channels=3, n_outputs=1)
    subject = Subject(
        model.to(memory_format=torch.channels_last), torch.empty(1, 3, 256, 256), "fp32"
    )
    prediction = predict(subject, "vanilla", load_profile("generic_cpu"), Options())
    return prediction.least_budget_bytes


# The first is refused, as it surely does not fit; the second is let through, and does run out.
@pytest.mark.parametrize(
    ("share", "why"),
    [(0.5, "predicted to need at least"), (0.89, "device memory ran out under memory=vanilla")],
)
def test_out_of_memory_is_an_outcome_with_its_own_exit_code(
    slides, umtrain, tmp_path, least_budget_bytes, share, why
):
    done = umtrain(
        "fit",
        "res=256",
        "epochs=1",
        "precision=fp32",
        "dataset.workers=0",
        "memory=vanilla",
        f"memory.device_budget={int(share * least_budget_bytes)}",
        f"dataset.manifest={slides}",
        "run_dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    assert why in done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["status"] == "oom"
    assert record["test"] is None
    assert why in record["reasons"]["test"]


@pytest.mark.fault("a spill folder that is not there", "exit 2 before training")
def test_a_spill_folder_that_cannot_be_used_ends_before_training(slides, umtrain, tmp_path):
    done = umtrain(
        *("fit", "res=64", "memory=lms", "memory.spill_dir=nowhere", "dataset.workers=0"),
        *(f"dataset.manifest={slides}", "run_dir=run"),
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "memory.spill_dir=nowhere cannot hold the spill file (No such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "steps.csv").exists()


# The kernel says that the disk is full once the first epoch's checkpoint is there.
_DISK_FILLS_UP = """
import os, sys
from pathlib import Path
from umtrain.cli import main

full, write = os.open("/dev/full", os.O_RDWR), os.pwrite
def pwrite(fd, data, position):
    return write(full if Path("run/checkpoints/step-00000004.pt").exists() else fd, data, position)
os.pwrite = pwrite
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault(
    "a spill disk that fills up in mid-training", "exit 3, the last checkpoint is whole"
)
def test_a_spill_disk_that_fills_up_in_mid_training_leaves_the_last_checkpoint(slides, tmp_path):
    words = ("fit", "model=resnet18", "res=64", "epochs=3", "memory=lms", "memory.spill_dir=.")
    command = [sys.executable, "-c", _DISK_FILLS_UP, *words, "dataset.workers=0"]
    command += [f"dataset.manifest={slides}"]
    done = subprocess.run(
        [*command, "run_dir=run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert (
        "host memory ran out: memory.spill_dir=.: the spill file could not be read or written"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004.pt")["epoch"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["status"] == "oom"
    assert record["train"]["epochs"] == 1
    assert "No space left on device" in record["reasons"]["status"]


@pytest.mark.fault("Ctrl-C in mid-training", "exit 130, saved")
def test_ctrl_c_ends_in_one_line_and_a_record(slides, tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "umtrain", "fit", "model=resnet18", "res=64"),
            *("epochs=1000", f"dataset.manifest={slides}", "run_dir=run"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # A shell's background job ignores the signal, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/1000: train"):
                break
        # As a terminal does: to the whole process group, readers included.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    said = (
        r"umtrain: interrupted by SIGINT, saved after step \d+; go on with: umtrain fit resume=run"
    )
    assert re.fullmatch(said, errors.strip())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"
