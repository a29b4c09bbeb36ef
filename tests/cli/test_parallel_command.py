"""`torchrun … -m umtrain fit`: several processes, one run."""

import csv
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

CHOICES = (
    "model=resnet18",
    "res=64",
    "epochs=2",
    "precision=fp32",
    "device=cpu",
    "dataset.workers=0",
    "cases=0",
    "model.sync_batchnorm=true",
)


def _command(n_ranks, *words):
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks))
    return [sys.executable, *start, "-m", "umtrain", *map(str, words)]


def _torchrun(n_ranks, *words, cwd):
    return subprocess.run(
        _command(n_ranks, *words),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _rows(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def runs(umtrain, slides, tmp_path_factory):
    """One run in one process with a batch of 3, and the same in three ranks with 1 each."""
    folder = tmp_path_factory.mktemp("parallel")
    words = ("fit", "dataset=wsi", f"dataset.manifest={slides}", *CHOICES)
    one = umtrain(*words, "batch_size=3", "memory=vanilla", f"run_dir={folder / 'one'}", cwd=folder)
    assert one.returncode == 0, one.stderr
    three = _torchrun(3, *words, "memory=stream", f"run_dir={folder / 'three'}", cwd=folder)
    assert three.returncode == 0, three.stderr
    return folder / "one", folder / "three", three


def test_ranks_train_and_evaluate_as_one_process(runs):
    one, three, _ = runs
    for name, keys in (("steps.csv", ("loss", "lr", "images")), ("predictions.csv", ("prob",))):
        expected, found = _rows(one / name), _rows(three / name)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            assert [float(b[key]) for key in keys] == pytest.approx(
                [float(a[key]) for key in keys], rel=2e-2
            )


def test_every_image_is_evaluated_once_and_in_order(runs):
    one, three, _ = runs
    order = [row["id"] for row in _rows(one / "predictions.csv")]
    assert [row["id"] for row in _rows(three / "predictions.csv")] == order


def test_only_the_first_rank_speaks_and_there_is_one_run(runs):
    _, three, done = runs
    assert done.stdout.count("report   ") == 1
    assert [path.name for path in three.parent.iterdir()] == ["one", "three"]
    record = json.loads((three / "metrics.json").read_text())
    assert record["status"] == "ok"
    assert record["parallel"]["n_ranks"] == 3
    assert len(record["parallel"]["rss_peak_bytes"]) == 3


def test_what_is_wrong_for_all_ranks_is_said_once(slides, tmp_path):
    words = ("fit", f"dataset.manifest={slides}", *CHOICES, "memory=nonsense")
    done = _torchrun(2, *words, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("unknown memory 'nonsense'") == 1


def test_interrupted_ranks_all_end_and_another_number_of_them_goes_on(slides, umtrain, tmp_path):
    words = ("fit", f"dataset.manifest={slides}", *CHOICES, "epochs=12", "run_dir=run")
    process = subprocess.Popen(
        _command(3, *words),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    with process:
        while not process.stdout.readline().startswith("epoch 1/"):
            assert process.poll() is None
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert psutil.wait_procs(ranks, timeout=30)[1] == []
    assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "interrupted"
    done = umtrain("fit", "resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "batches of 1 images, 3 before" in done.stdout
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (record["status"], record["train"]["epochs"]) == ("ok", 12)
    n_images = {row["epoch"]: 0 for row in _rows(tmp_path / "run/steps.csv")}
    for row in _rows(tmp_path / "run/steps.csv"):
        n_images[row["epoch"]] += int(row["images"])
    assert len(n_images) == 12
    assert set(n_images.values()) == {4}


@pytest.mark.parametrize("memory", ["vanilla", "stream"])
def test_a_rank_whose_image_cannot_be_read_keeps_the_others_company(slides, tmp_path, memory):
    rows = _rows(slides)
    for row in rows:
        row["path"] = str(slides.parent / row["path"])
        row["mask"] = ""
    [broken, *_] = [row for row in rows if row["split"] == "train"]
    broken["path"] = str(tmp_path / "broken.tif")
    (tmp_path / "broken.tif").write_bytes(b"no slide")
    with (tmp_path / "slides.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = ("fit", "dataset.manifest=slides.csv", *CHOICES, f"memory={memory}", "run_dir=run")
    done = _torchrun(2, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [entry["id"] for entry in record["data"]["skipped"]] == [broken["slide_id"]]
    images = [int(row["images"]) for row in _rows(tmp_path / "run/steps.csv")]
    assert sorted(images) == [1, 1, 2, 2]


def test_a_command_of_one_process_refuses_torchrun(tmp_path):
    done = _torchrun(2, "sweep", "res=64,128", cwd=tmp_path)
    assert done.stderr.count("umtrain sweep is one process") == 1
