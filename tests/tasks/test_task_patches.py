import csv
import dataclasses

import pytest
import torch

from umtrain import tasks, two_stage
from umtrain.config import load_config
from umtrain.data.manifest import read_manifest
from umtrain.data.masks import CLASSES
from umtrain.errors import DataError
from umtrain.tasks.patches import PatchTask


def rewritten(slides, target, change):
    """Write the slides' manifest to `target`, each row changed in place."""
    with slides.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        for column in ("path", "mask"):
            row[column] = str(slides.parent / row[column])
        change(row)
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def make_task(manifest, *overrides):
    words = ("approach=two_stage", "res=64", "dataset.patches_per_slide=3", "dataset.workers=0")
    config = load_config([f"dataset.manifest={manifest}", *words, *overrides])
    config = dataclasses.replace(config, device="cpu", precision="fp32")
    return PatchTask(config, read_manifest(manifest, "wsi"))


def test_an_epoch_is_all_patches_of_the_training_slides(slides):
    task = make_task(slides, "batch_size=5")
    assert len(task.manifest.split("train")) == 4 * 3
    batches = list(task.loader("train", training=True))
    assert sum(len(batch["id"]) for batch in batches) == 4 * 3
    assert batches[0]["image"].shape == (5, 3, 64, 64)
    assert {int(label) for batch in batches for label in batch["label"]} <= {0, 1, 2}


def test_validation_is_the_same_patches_every_time(slides):
    task = make_task(slides)
    first, again = (list(task.loader("val", training=False)) for _ in range(2))
    assert all(a["image"].equal(b["image"]) for a, b in zip(first, again, strict=True))


def test_only_training_slides_need_a_mask(slides, tmp_path):
    def without_later_masks(row):
        if row["split"] != "train":
            row["mask"] = ""

    manifest = rewritten(slides, tmp_path / "m.csv", without_later_masks)
    two_stage.check_masks(read_manifest(manifest, "wsi"))
    task = make_task(manifest)
    assert task.manifest.split("val") == ()
    assert len(task.dataset("val", training=False)) == 0


def test_missing_masks_are_named_by_row_with_what_a_mask_is(slides, tmp_path):
    def spoiled(row):
        if row["split"] == "train":
            row["mask"] = "" if row["slide_id"] == "slide_0000" else row["mask"] + ".gone"

    manifest = rewritten(slides, tmp_path / "m.csv", spoiled)
    with pytest.raises(DataError) as caught:
        two_stage.check_masks(read_manifest(manifest, "wsi"))
    text = str(caught.value)
    assert "4 of 4 training slides lack one" in text
    assert "row 2: slide_0000 has no mask" in text
    assert "row 3: slide_0001 has the mask" in text
    assert "0 background, 1 benign tissue, 2 cancer" in text


def test_each_class_has_the_same_say_if_slides_have_what_their_labels_promise(slides):
    task = make_task(slides)
    # Two slides of each label and six turns: 2 * (3, 3, 0) + 2 * (2, 2, 2) patches.
    drawn = torch.tensor([0] * 10 + [1] * 10 + [2] * 4)
    logits = torch.randn(1, 3).expand(24, 3)
    losses = torch.nn.functional.cross_entropy(logits, drawn, reduction="none")
    by_class = torch.stack([losses[drawn == number].mean() for number in range(3)])
    assert task.loss(logits, {"label": drawn}).item() == pytest.approx(by_class.mean().item())
    alike = make_task(slides, "optim.class_weights=none")
    assert alike.loss(logits, {"label": drawn}).item() == pytest.approx(losses.mean().item())


def test_predictions_are_probabilities_and_metrics_their_auc(slides):
    task = make_task(slides)
    batch = {"id": ["a", "a", "b", "b"], "label": torch.tensor([0, 1, 2, 2])}
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [0, 12, 2]])
    rows = task.predictions(logits, batch, "val")
    assert all(sum(row[name] for name in CLASSES) == pytest.approx(1) for row in rows)
    metrics = task.metrics(rows)
    assert metrics["patch_accuracy"] == 0.75
    # The last is more benign than the one that is, and less like cancer than the first two.
    assert metrics["patch_auc"] == pytest.approx((1 + 2 / 3 + 2 / 4) / 3)
    one_class = task.metrics([row for row in rows if row["label"] == 2])
    assert one_class["patch_auc"] is None
    assert "the split has one" in one_class["patch_auc_reason"]


def test_the_network_of_two_stages_is_that_of_patches(slides):
    task = make_task(slides)
    whole = tasks.create(task.config, task.slides)
    assert isinstance(two_stage.network_task(whole), PatchTask)
    assert whole.n_outputs == 1
    assert two_stage.network_task(whole).n_outputs == 3
    plain = dataclasses.replace(
        whole.config,
        approach="no_fuss",
        dataset=dataclasses.replace(whole.config.dataset, patches_per_slide=None),
    )
    other = tasks.create(plain, task.slides)
    assert two_stage.network_task(other) is other
