"""A step some of whose images were left out: the mean over the others, to the last bit of sense."""

import copy
import dataclasses

import pytest
import torch

from umtrain import memory, tasks
from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.manifest import read_manifest
from umtrain.logger import create_logger
from umtrain.training import Trainer


class Watched(Trainer):
    """Keeps the gradients that each update is made with, and whether it moved a weight."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.used, self.moved = [], []

    def _update(self):
        parameters = list(self.model.parameters())
        before = [p.detach().clone() for p in parameters]
        self.used.append([p.grad.clone() for p in parameters if p.grad is not None])
        super()._update()
        self.moved.append(not all(map(torch.equal, before, parameters)))


@pytest.fixture
def trainer(slides, tmp_path):
    def make(n_gone, batch_size, accumulate):
        config = load_config(
            [
                *(f"dataset.manifest={slides}", "model=resnet18", "res=64", "precision=fp32"),
                *(
                    "device=cpu",
                    "memory=vanilla",
                    "dataset.workers=0",
                    "optim.class_weights=none",
                    "seed=3",
                ),
                *(f"batch_size={batch_size}", f"optim.accumulate={accumulate}", "epochs=1"),
                "dataset.max_bad_fraction=0.9",
            ]
        )
        manifest = read_manifest(slides, "wsi")
        ids = [record.id for record in manifest.split("train")][:n_gone]
        records = tuple(
            dataclasses.replace(r, path=tmp_path / "gone") if r.id in ids else r
            for r in manifest.records
        )
        torch.manual_seed(0)
        task = tasks.create(config, dataclasses.replace(manifest, records=records))
        return Watched(
            task,
            task.create_model(),
            memory.create("vanilla", device="cpu"),
            torch.device("cpu"),
            tmp_path,
            Console(),
            create_logger("none", tmp_path),
        )

    return make


def mean_loss_and_gradients(trainer):
    """Of the images that there are: each batch normalised by itself, all of them weighed alike."""
    model = copy.deepcopy(trainer.model).train()
    trainer.loader.set_epoch(1)
    batches = [batch for batch in trainer.loader if batch["id"]]
    n_images = sum(len(batch["id"]) for batch in batches)
    total = 0.0
    for batch in batches:
        outputs = model(trainer.task.inputs(batch, torch.device("cpu"), torch.float32))
        loss = trainer.task.loss(outputs, batch) * len(batch["id"]) / n_images
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("n_gone", "batch_size", "accumulate"), [(1, 2, 2), (2, 1, 4), (0, 1, 4)])
def test_a_step_is_the_mean_over_the_images_there_are(trainer, n_gone, batch_size, accumulate):
    made = trainer(n_gone, batch_size, accumulate)
    loss, gradients = mean_loss_and_gradients(made)
    made.fit()
    (step,) = made.progress.steps
    assert step.images == 4 - n_gone
    assert step.loss == pytest.approx(loss, rel=1e-5)
    for used, expected in zip(made.used[0], gradients, strict=True):
        torch.testing.assert_close(used, expected, rtol=1e-4, atol=1e-6)


def test_a_step_without_images_changes_no_weight_but_takes_its_place_in_the_schedule(trainer):
    made = trainer(1, 1, 1)
    made.fit()
    steps = made.progress.steps
    assert [step.images for step in steps].count(0) == 1
    assert made.moved == [True, True, True]
    whole = trainer(0, 1, 1)
    whole.fit()
    assert [step.lr for step in steps] == [step.lr for step in whole.progress.steps]
    figures = made.progress.train_figures()
    assert figures["steps"] == 4
    assert figures["loss_first"] == next(step.loss for step in steps if step.images)
