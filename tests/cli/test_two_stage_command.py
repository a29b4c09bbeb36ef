"""`approach=two_stage` as a user runs it."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

SMALL = (
    *("approach=two_stage", "res=64", "dataset.patches_per_slide=4", "batch_size=8", "epochs=1"),
    *("model=resnet18", "device=cpu", "precision=fp32"),
)
# Threads that wait for each other on a busy machine cost more than they bring to patches.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished_run(slides, umtrain, tmp_path_factory):
    """A whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("two_stage")
    done = umtrain(
        *("fit", *SMALL, "dataset.workers=0", f"dataset.manifest={slides}", "run_dir=run"),
        cwd=folder,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def read(run_dir):
    return json.loads((run_dir / "metrics.json").read_text())


def test_the_record_has_both_stages(finished_run):
    run_dir, printed = finished_run
    record = read(run_dir)
    assert (record["status"], record["approach"]) == ("ok", "two_stage")
    assert record["annotation"].startswith("masks and labels of 4 training slides")
    assert record["train"]["steps"] == 2  # 4 slides of 4 patches, 8 a step
    assert record["throughput"]["unit"] == "patches"
    assert 0 <= record["train"]["validations"][0]["patch_auc"] <= 1
    assert record["train"]["slide_model"]["n_slides"] == 4
    assert record["memory_use"]["device_peak_bytes"] > 0
    for split in ("val", "test"):
        assert record[split]["n"] == 2
        assert 0 <= record[split]["auc"] <= 1
        assert record[split]["loss"] > 0
    assert "4 patches a training slide" in printed


def test_predictions_are_one_row_a_slide(finished_run):
    with (finished_run[0] / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "split", "label", "prob"]
    assert sorted(row["split"] for row in rows) == ["test", "test", "val", "val"]
    assert all(0 < float(row["prob"]) < 1 for row in rows)


def test_every_slide_has_its_map(finished_run, slides):
    run_dir, _ = finished_run
    with slides.open() as stream:
        ids = [row["slide_id"] for row in csv.DictReader(stream)]
    assert sorted(path.stem for path in (run_dir / "maps").iterdir()) == sorted(ids)
    with np.load(run_dir / "maps" / f"{ids[0]}.npz") as values:
        assert values["probs"].shape == (3, 4, 4)
        assert values["probs"].dtype == np.float32
        assert np.allclose(values["probs"].sum(axis=0), 1, atol=1e-5)
        assert (values["probs"][0][~values["tissue"]] == 1).all()
        assert values["tissue"].any()
        assert (values["l0_x"], values["l0_y"], values["l0_side"]) == (0, 0, 64)


def test_eval_gives_the_figures_that_fit_ended_with_whoever_reads_the_patches(
    finished_run, umtrain
):
    run_dir, _ = finished_run
    before = read(run_dir)
    done = umtrain("eval", "run=run", "dataset.workers=2", cwd=run_dir.parent, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert read(run_dir)["test"] == before["test"]


def _without(manifest, target, split):
    """Write the manifest to `target`, the masks of `split` left out."""
    with manifest.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["path"] = str(manifest.parent / row["path"])
        row["mask"] = "" if row["split"] in split else str(manifest.parent / row["mask"])
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def test_without_masks_of_training_slides_nothing_is_written(slides, umtrain, tmp_path):
    bare = _without(slides, tmp_path / "m.csv", ("train",))
    done = umtrain(
        "fit", *SMALL, f"dataset.manifest={bare}", "run_dir=run", cwd=tmp_path, env=ONE_THREAD
    )
    assert done.returncode == 2
    assert "4 of 4 training slides lack one" in done.stderr
    assert "row 2: slide_0000 has no mask" in done.stderr
    assert "0 background, 1 benign tissue, 2 cancer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_other_slides_need_no_masks(slides, umtrain, tmp_path):
    bare = _without(slides, tmp_path / "m.csv", ("val", "test"))
    done = umtrain(
        *("fit", *SMALL, "dataset.workers=0", f"dataset.manifest={bare}", "run_dir=run"),
        cwd=tmp_path,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr
    assert "no validation images" in done.stdout
    record = read(tmp_path / "run")
    assert record["train"]["best_epoch"] == 1
    assert record["val"]["n"] == record["test"]["n"] == 2


def test_a_mask_of_another_slide_is_named_before_training(slides, umtrain, tmp_path):
    Image.new("L", (7, 31)).save(tmp_path / "wrong.png")
    wrong = _without(slides, tmp_path / "m.csv", ())
    mask = str(slides.parent / "masks" / "slide_0001.png")
    wrong.write_text(wrong.read_text().replace(mask, str(tmp_path / "wrong.png")))
    done = umtrain(
        "fit", *SMALL, f"dataset.manifest={wrong}", "run_dir=run", cwd=tmp_path, env=ONE_THREAD
    )
    assert done.returncode == 2
    assert "wrong.png: is 7×31 px and its slide 256×256" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
