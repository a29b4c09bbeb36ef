import dataclasses

import pytest
import torch

from umtrain import tasks
from umtrain.config import load_config
from umtrain.data.manifest import read_manifest
from umtrain.models.heatmap import target_heatmaps
from umtrain.models.resunet35 import HEATMAP_STRIDE


@pytest.fixture
def task(radiographs):
    return _task(radiographs, "batch_size=4")


def _task(radiographs, *overrides):
    config = load_config(
        [
            *("dataset=spine", "res=256", f"dataset.manifest={radiographs}"),
            *("dataset.workers=0", *overrides),
        ]
    )
    config = dataclasses.replace(config, device="cpu", precision="fp32")
    return tasks.create(config, read_manifest(radiographs, "spine"))


def test_perfect_heatmaps_lead_back_to_the_manifests_keypoints(task):
    films = {film.image_id: film for film in task.manifest.records}
    for batch in task.loader("train", training=False):
        shape = tuple(side // HEATMAP_STRIDE for side in task.input_shape)
        perfect = target_heatmaps(batch["keypoints"], shape, HEATMAP_STRIDE).clamp(min=1e-30).log()
        for row in task.predictions(perfect, batch, "train"):
            film = films[row["id"]]
            for name in ("c7", "s1"):
                for axis in "xy":
                    expected = getattr(film, f"{name}_{axis}")
                    assert row[f"{name}_{axis}_true"] == pytest.approx(expected, abs=0.01)
                    # A tenth of a pixel of the network's frame, two stored pixels each.
                    assert row[f"{name}_{axis}_pred"] == pytest.approx(expected, abs=0.2)
            assert row["sva_pred_mm"] == pytest.approx(row["sva_true_mm"], abs=0.5)


def test_each_film_is_normalised_by_itself(task):
    batch = next(iter(task.loader("train", training=False)))
    inputs = task.inputs(batch, torch.device("cpu"), torch.float32)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    for film in inputs:
        deviation, mean = torch.std_mean(film)
        assert mean.item() == pytest.approx(0, abs=1e-4)
        assert deviation.item() == pytest.approx(1, abs=1e-3)


# Note: [Batch size 1] in umtrain/models/norm.py
def test_by_default_a_film_is_evaluated_with_the_statistics_it_was_trained_with(radiographs):
    task = _task(radiographs)
    torch.manual_seed(0)
    model = task.create_model()
    batch = next(iter(task.loader("train", training=False)))
    inputs = task.inputs(batch, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        trained = model.train()(inputs)
        torch.testing.assert_close(model.eval()(inputs), trained)


def test_the_smaller_error_is_the_better_score(task):
    assert task.score({"mae_mm": 1.0}, 5.0) > task.score({"mae_mm": 2.0}, 0.1)
    assert task.score({"mae_mm": 1.0}, 0.1) > task.score({"mae_mm": 1.0}, 0.2)
    assert task.score({"mae_mm": 9.0}, 1.0) > task.score({"mae_mm": None}, 0.1)


def test_evidence_of_a_split_is_that_of_its_rows_and_patients(radiographs):
    task = _task(radiographs)
    rows = []
    for batch in task.loader("train", training=False):
        shape = tuple(side // HEATMAP_STRIDE for side in task.input_shape)
        perfect = target_heatmaps(batch["keypoints"], shape, HEATMAP_STRIDE).clamp(min=1e-30).log()
        rows += task.predictions(perfect, batch, "train")
    found = task.evidence(rows, None)
    films = task.manifest.split("train")
    assert (found["n"], found["n_patients"]) == (len(films), len({f.patient_id for f in films}))
    quick = task.metrics(rows)
    assert {key: found[key] for key in quick} == quick
    assert found["icc"]["value"] > 0.99
    assert found["success"]["c7"]["2"] == 1
    errors_mm = [row["sva_pred_mm"] - row["sva_true_mm"] for row in rows]
    assert found["bland_altman"]["bias_mm"] == pytest.approx(sum(errors_mm) / len(errors_mm))
