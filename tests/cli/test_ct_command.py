"""`umtrain fit dataset=ct` as a user runs it."""

import csv
import json

import pytest

SMALL = ("dataset=ct", "res=32", "dataset.depth=18", "epochs=1", "batch_size=2", "cases=1")


@pytest.fixture(scope="module")
def finished(volumes, umtrain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct")
    manifest = f"dataset.manifest={volumes}"
    done = umtrain(
        "fit", *SMALL, manifest, "run_dir=run", "memory=stream", "dataset.workers=0", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_a_run_on_volumes_has_the_evidence_of_slides(finished):
    run_dir, _ = finished
    record = json.loads((run_dir / "metrics.json").read_text())
    assert (record["status"], record["model"]) == ("ok", "resnet18_3d")
    assert record["memory_use"]["strategy"] == "stream"
    assert record["data"]["positive"] == "mass"
    assert record["data"]["grid"] == "18 × 32 × 32 voxels"
    assert record["annotation"] == "one label for each of 4 training volumes"
    assert 0 <= record["test"]["auc"] <= 1
    page = (run_dir / "report.html").read_text()
    assert "On 2 test volumes: AUC" in page
    words = page.split("<body")[1].replace("openslide", "").replace("patches_per_slide", "")
    assert "slide" not in words


def test_cases_are_slices_with_grad_cam(finished):
    run_dir, _ = finished
    case = json.loads((run_dir / "metrics.json").read_text())["test"]["cases"][0]
    assert (run_dir / case["picture"]).is_file()
    assert (run_dir / case["picture"]).with_suffix(".npy").is_file()
    assert "of 18 from the feet" in case["caption"]


def test_patients_of_the_headers_are_nowhere(finished):
    run_dir, done = finished
    for path in run_dir.rglob("*"):
        if path.suffix in (".json", ".csv", ".html", ".txt", ".yaml"):
            assert "SYNTHETIC^" not in path.read_text()
    assert "SYNTHETIC^" not in done.stdout + done.stderr
    with (run_dir / "predictions.csv").open() as stream:
        assert set(csv.DictReader(stream).fieldnames) == {"id", "split", "label", "prob"}


def test_bf16_is_refused_on_a_processor(volumes, umtrain, tmp_path):
    given = ("device=cpu", "precision=bf16", f"dataset.manifest={volumes}")
    done = umtrain("fit", *SMALL, *given, cwd=tmp_path)
    assert done.returncode == 2
    assert "use precision=fp32, or device=cuda" in done.stderr


def test_a_volume_that_is_gone_is_said_before_training(volumes, umtrain, tmp_path):
    text = volumes.read_text().replace("volumes/", f"{volumes.parent}/volumes/", 1)
    (tmp_path / "m.csv").write_text(text)
    done = umtrain("fit", *SMALL, "dataset.manifest=m.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "7 of 8 files are missing" in done.stderr
