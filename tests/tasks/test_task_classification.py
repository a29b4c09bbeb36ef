import copy
import dataclasses

import pytest
import torch
import torchvision
from torchvision.transforms.functional import normalize

from umtrain import tasks
from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.manifest import read_manifest
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
        trainer = Trainer(task, model, strategy, torch.device("cpu"), tmp_path, Console())
        before = copy.deepcopy(model.state_dict())
        trainer.fit()
        strategy.close()
        steps[name] = {key: value - before[key] for key, value in model.state_dict().items()}
        assert trainer.progress.steps[0].images == 4
    for name in ("accumulated", "uneven"):
        for key, change in steps["large"].items():
            gap = (steps[name][key] - change).norm() / change.norm().clamp(min=1e-12)
            assert gap < 1e-3, (name, key)
