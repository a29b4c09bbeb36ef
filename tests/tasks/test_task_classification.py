import copy
import dataclasses
import json

import pytest
import torch
import torchvision
from torchvision.transforms.functional import normalize

from umtrain import tasks
from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.manifest import read_manifest
from umtrain.logger import RunLogger
from umtrain.memory import create
from umtrain.training import Trainer


def make_task(slides, *overrides):
    config = load_config([f"dataset.manifest={slides}", "res=64", "dataset.workers=0", *overrides])
    config = dataclasses.replace(config, device="cpu", precision="fp32")
    return tasks.create(config, read_manifest(slides, "wsi"))


def batch(labels):
    return {
        "image": torch.full((len(labels), 3, 2, 2), 255, dtype=torch.uint8),
        "label": torch.tensor(labels),
        "id": [f"s{i}" for i in range(len(labels))],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_white_is_zero_and_every_grey_level_is_exact(slides, dtype):
    task = make_task(slides)
    greys = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    inputs = task.inputs({"image": greys}, torch.device("cpu"), dtype)
    assert inputs[0, 0, -1, -1] == 0
    assert torch.equal(inputs.float() * 64, 255 - greys.float())


def test_pretrained_weights_see_what_torchvision_gives_them(slides, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    task = make_task(slides, f"model.pretrained={weights}")
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    inputs = task.inputs({"image": image}, torch.device("cpu"), torch.float32)
    expected = normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(inputs, expected)


def test_balanced_weights_give_both_classes_the_same_say(slides):
    balanced = make_task(slides)
    balanced._positive_weight, balanced._negative_weight = 4 / 2, 4 / 6
    logits = torch.zeros(4, 1)
    loss = balanced.loss(logits, batch([1, 0, 0, 0]))
    # One positive at weight 2 and three negatives at 2/3, each of loss log 2.
    assert loss.item() == pytest.approx((2 + 3 * 2 / 3) / 4 * torch.log(torch.tensor(2.0)).item())


def test_predictions_are_probabilities_of_the_positive_class(slides):
    rows = make_task(slides).predictions(torch.tensor([[0.0], [100.0]]), batch([0, 1]), "test")
    assert [row["prob"] for row in rows] == [0.5, 1.0]
    assert [row["label"] for row in rows] == [0, 1]


def test_accumulated_batches_are_one_large_batch(slides, tmp_path):
    steps = {}
    for name, overrides in {
        "large": ["batch_size=4"],
        "accumulated": ["batch_size=1", "optim.accumulate=4"],
        "uneven": ["batch_size=3", "optim.accumulate=2"],
    }.items():
        common = ("model.norm=group", "dataset.augment=false", "max_steps=1", "optim=sgd")
        task = make_task(slides, *common, *overrides)
        torch.manual_seed(0)
        model = task.create_model()
        strategy = create("vanilla")
        device = torch.device("cpu")
        trainer = Trainer(task, model, strategy, device, tmp_path, Console(), RunLogger())
        before = copy.deepcopy(model.state_dict())
        trainer.fit()
        strategy.close()
        steps[name] = {key: value - before[key] for key, value in model.state_dict().items()}
        assert trainer.progress.steps[0].images == 4
    for name in ("accumulated", "uneven"):
        for key, change in steps["large"].items():
            gap = (steps[name][key] - change).norm() / change.norm().clamp(min=1e-12)
            assert gap < 1e-3, (name, key)


def rows_of(task, split, probs):
    """Return a row for each of `probs`, by turns of the split's slides, the even ones positive."""
    slides = task.manifest.split(split)
    return [
        {"id": slides[i % len(slides)].id, "split": split, "label": (i + 1) % 2, "prob": prob}
        for i, prob in enumerate(probs)
    ]


def test_the_validation_split_is_judged_at_its_own_best_threshold_and_says_so(slides):
    task = make_task(slides)
    found = task.evidence(rows_of(task, "val", [0.4, 0.1, 0.3, 0.2]), None)
    assert found["threshold"] == pytest.approx(0.25)
    assert found["threshold_from"] == "the largest Youden index of this split, which flatters it"
    assert (found["sensitivity"], found["specificity"]) == (1, 1)


def test_the_test_split_is_judged_at_the_validation_splits_threshold(slides):
    task = make_task(slides)
    validation = task.evidence(rows_of(task, "val", [0.4, 0.1, 0.3, 0.2]), None)
    # As it is read back from metrics.json.
    validation = json.loads(json.dumps(validation))
    found = task.evidence(rows_of(task, "test", [0.9, 0.3, 0.8, 0.1]), validation)
    assert found["threshold"] == validation["threshold"]
    assert found["threshold_from"] == "chosen on the validation split"
    assert found["confusion"] == {"tp": 2, "fp": 1, "tn": 1, "fn": 0}


@pytest.mark.parametrize("validation", [None, {}, {"auc": 0.8, "threshold": None}])
def test_without_a_chosen_threshold_it_is_one_half_and_says_so(slides, validation):
    task = make_task(slides)
    found = task.evidence(rows_of(task, "test", [0.9, 0.3]), validation)
    assert found["threshold"] == 0.5
    assert found["threshold_from"] == "0.5, as none was chosen on a validation split"


def test_a_validation_split_of_one_class_chooses_for_nobody(slides):
    task = make_task(slides)
    validation = task.evidence(rows_of(task, "val", [0.9]), None)
    assert validation["threshold"] == 0.5
    assert validation["threshold_from"].startswith("0.5, as this split has one class only")
    found = task.evidence(rows_of(task, "test", [0.9, 0.3]), validation)
    assert found["threshold_from"] == "0.5, as none was chosen on a validation split"


def test_slides_of_a_patient_are_one_in_the_evidence_and_unnamed(slides):
    manifest = read_manifest(slides, "wsi")
    shared = [dataclasses.replace(slide, patient_id="Mary Doe") for slide in manifest.records]
    task = make_task(slides)
    task.manifest = dataclasses.replace(manifest, records=tuple(shared))
    found = task.evidence(rows_of(task, "test", [0.9, 0.3]), None)
    assert found["n_patients"] == 1
    assert found["auc_ci_bootstrap"] is None
    assert "Mary" not in json.dumps(found)


def test_evidence_has_the_quick_metrics_of_the_rows(slides):
    task = make_task(slides)
    rows = rows_of(task, "train", [0.9, 0.3, 0.6, 0.8])
    found = task.evidence(rows, None)
    assert {key: found[key] for key in task.metrics(rows)} == task.metrics(rows)
