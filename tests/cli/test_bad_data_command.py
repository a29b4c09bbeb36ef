"""What `umtrain fit` makes of images that turn unreadable while it runs."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

SMALL = (
    *("model=resnet18", "res=64", "precision=fp32", "dataset.workers=1", "cases=1"),
    "memory=vanilla",
)


@pytest.fixture
def own_slides(slides, tmp_path):
    """A copy of the slides that a test may damage."""
    shutil.copytree(slides.parent, tmp_path / "slides")
    return tmp_path / "slides" / slides.name


def rows(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def of_split(manifest, split):
    return [row for row in rows(manifest) if row["split"] == split]


def cut_short(manifest, row):
    path = manifest.parent / row["path"]
    path.write_bytes(path.read_bytes()[:3000])


def kill_a_reader(trainer):
    """Kill what a fork server of the trainer has forked."""
    family = psutil.Process(trainer.pid).children(recursive=True)
    servers = {child.pid for child in psutil.Process(trainer.pid).children()}
    readers = [child for child in family if child.pid not in servers]
    os.kill(readers[0].pid, signal.SIGKILL)


@pytest.mark.fault(
    "a slide that turns unreadable, another that goes", "left out, listed, counted; exit 0"
)
@pytest.mark.fault("a reader killed in mid-epoch", "replaced, nothing lost; exit 0")
def test_a_run_goes_on_without_what_turned_unreadable_and_says_so(own_slides, tmp_path):
    lost, gone = of_split(own_slides, "train")[1], of_split(own_slides, "test")[0]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "umtrain", "fit", *SMALL, "epochs=3"),
            *(f"dataset.manifest={own_slides}", "run_dir=run"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.umask(0o022),
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/3: train"):
                cut_short(own_slides, lost)
                (own_slides.parent / gone["path"]).unlink()
                kill_a_reader(process)
                break
        printed, errors = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    first, second = record["data"]["skipped"]
    assert (first["id"], first["split"]) == (lost["slide_id"], "train")
    assert first["epoch"] in (2, 3)  # the second had perhaps been read ahead
    assert first["row"] == rows(own_slides).index(lost) + 2
    assert (second["id"], second["split"]) == (gone["slide_id"], "test")
    assert "no such slide file" in second["reason"]
    assert (record["test"]["n"], record["test"]["n_skipped"]) == (1, 1)
    assert gone["slide_id"] not in {row["id"] for row in rows(tmp_path / "run" / "predictions.csv")}
    steps = rows(tmp_path / "run" / "steps.csv")
    assert [int(step["step"]) for step in steps] == list(range(1, 13))
    without = [step for step in steps if step["images"] == "0"]
    assert [step["loss"] for step in without] == ["nan"] * len(without)
    assert 1 <= len(without) <= 2
    log, page = ((tmp_path / "run" / name).read_text() for name in ("log.txt", "report.html"))
    for text in (printed, log):
        assert f"left out: row {first['row']}, {lost['slide_id']} of train: " in text
    assert "Images left out, and why" in page
    assert lost["slide_id"] in page.split("Images left out, and why")[-1]
    written = list((tmp_path / "run").rglob("*"))
    assert {oct(p.stat().st_mode & 0o777) for p in written if p.is_file()} == {"0o644"}
    assert {oct(p.stat().st_mode & 0o777) for p in written if p.is_dir()} == {"0o755"}


@pytest.mark.fault("more bad images than dataset.max_bad_fraction", "exit 2, each listed")
def test_a_run_stops_when_too_many_images_are_bad(own_slides, umtrain, tmp_path):
    bad = of_split(own_slides, "train")[:2]
    for row in bad:
        cut_short(own_slides, row)
    done = umtrain(
        "fit", *SMALL, "epochs=1", f"dataset.manifest={own_slides}", "run_dir=run", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "2 of 4 images of split train cannot be read" in done.stderr
    assert "dataset.max_bad_fraction lets 1 be left out" in done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["status"] == "failed"
    assert all(row["slide_id"] in record["reasons"]["status"] for row in bad)
    assert len(record["data"]["skipped"]) == 1  # what was left out before it was too many
