"""Maps of slides, made by a small network that looks at colours."""

import dataclasses

import numpy as np
import pytest
import tifffile
import torch
from torch import nn

from umtrain import two_stage
from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.manifest import read_manifest
from umtrain.data.synthetic.slides import make_slides
from umtrain.data.wsi import plan_frame, slide_info
from umtrain.errors import RunError
from umtrain.evaluation.probability_map import ProbabilityMap, read_map, write_map
from umtrain.tasks import create
from umtrain.tasks.patches import PatchTask

RES = 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Six slides, two for each split; one of them is made wide, and one white."""
    folder = tmp_path_factory.mktemp("two_stage")
    path = make_slides(folder, 6, 512, 2)
    _rewrite(folder / "slides" / "slide_0004.tif", lambda image: image[:300])
    _rewrite(folder / "slides" / "slide_0005.tif", lambda image: np.full_like(image, 255))
    return read_manifest(path, "wsi")


def _rewrite(path, change):
    image = np.ascontiguousarray(change(tifffile.imread(path, key=0)))
    tifffile.imwrite(path, image, tile=(128, 128), photometric="rgb", compression="jpeg")


def make_task(manifest, *overrides):
    words = ("approach=two_stage", f"res={RES}", "dataset.workers=0", "batch_size=4")
    config = load_config([f"dataset.manifest={manifest.path}", *words, *overrides])
    return PatchTask(dataclasses.replace(config, device="cpu", precision="fp32"), manifest)


def colour_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).train()


@pytest.fixture(scope="module")
def mapped(manifest, tmp_path_factory):
    """The test slides' maps by id, the task, the network, and the run's folder."""
    run_dir = tmp_path_factory.mktemp("run")
    task, network = make_task(manifest), colour_network()
    found = two_stage.probability_maps(task, network, "test", run_dir, Console())
    return {slide.id: values for slide, values in found}, task, network, run_dir


def test_a_map_has_what_the_network_says_of_each_patch(mapped, manifest):
    maps, task, network, _ = mapped
    assert sorted(maps) == ["slide_0004", "slide_0005"]
    wide = maps["slide_0004"]
    assert wide.probs.shape == (3, 5, 8)  # 300 by 512 pixels
    image = tifffile.imread(manifest.split("test")[0].path, key=0)
    image = np.pad(image, ((0, 20), (0, 0), (0, 0)), constant_values=255)
    assert wide.tissue.any()
    assert not wide.tissue.all()
    for row, column in np.argwhere(wide.tissue):
        x, y = map(int, wide.to_l0(column, row))
        patch = torch.from_numpy(image[y : y + RES, x : x + RES]).permute(2, 0, 1)[None]
        inputs = task.inputs({"image": patch}, torch.device("cpu"), torch.float32)
        expected = network(inputs).softmax(1)[0].detach().numpy()
        assert np.allclose(wide.probs[:, row, column], expected, atol=0.01)
    unseen = wide.probs[:, ~wide.tissue]
    assert (unseen == np.array([[1], [0], [0]])).all()


def test_a_slide_without_tissue_is_background(mapped):
    white = mapped[0]["slide_0005"]
    assert not white.tissue.any()
    assert (white.cancer == 0).all()


def test_the_run_keeps_the_maps_that_were_judged(mapped, manifest):
    maps, _, network, run_dir = mapped
    for slide in manifest.split("test"):
        kept = read_map(two_stage.map_path(run_dir, slide))
        assert np.array_equal(kept.probs, maps[slide.id].probs)
    assert network.training  # as it was


def test_the_slide_model_is_fitted_on_training_slides_and_read_back(manifest, tmp_path):
    task, network = make_task(manifest), colour_network()
    fitted = two_stage.fit_slides(task, network, tmp_path, Console())
    assert fitted.n_slides == 2
    rows, loss = two_stage.slide_rows(task, network, "test", tmp_path, Console())
    assert [(row["id"], row["split"]) for row in rows] == [
        ("slide_0004", "test"),
        ("slide_0005", "test"),
    ]
    right = [row["prob"] if row["label"] else 1 - row["prob"] for row in rows]
    assert loss == pytest.approx(-np.mean(np.log(right)))


def test_a_slide_that_cannot_be_read_has_no_map_and_is_noted(manifest, tmp_path):
    whole = manifest.split("test")[0]
    cut = dataclasses.replace(whole, path=tmp_path / "cut.tif")
    cut.path.write_bytes(whole.path.read_bytes()[:1000])
    records = tuple(cut if r is whole else r for r in manifest.records)
    task = make_task(dataclasses.replace(manifest, records=records))
    found = two_stage.probability_maps(task, colour_network(), "test", tmp_path, Console())
    assert [slide.id for slide, _ in found] == ["slide_0005"]
    assert [entry["id"] for entry in task.skipped.entries] == ["slide_0004"]


def test_without_a_slide_model_there_is_no_prediction(manifest, tmp_path):
    with pytest.raises(RunError, match="no such slide model"):
        two_stage.slide_rows(make_task(manifest), colour_network(), "test", tmp_path, Console())


@pytest.mark.parametrize("slide_id", ["a/b", "..", "übung 1", "x" * 400])
def test_any_id_has_a_file_inside_the_run(manifest, tmp_path, slide_id):
    slide = dataclasses.replace(manifest.records[0], slide_id=slide_id)
    path = two_stage.map_path(tmp_path, slide)
    assert path.parent == tmp_path / "maps"
    path.parent.mkdir()
    write_map(path, ProbabilityMap(np.ones((3, 1, 1)), np.ones((1, 1), bool), 0.0, 0.0, 1.0))
    assert path.is_file()


def test_the_map_that_is_drawn_lies_where_the_patches_lie(mapped, manifest):
    maps, task, _, run_dir = mapped
    slide = manifest.split("test")[0]
    with two_stage.cancer_maps(task, "test", run_dir) as explain:
        drawn = explain(slide.id)
    kept = maps[slide.id]
    frame = plan_frame(slide_info(slide.path), *drawn.view, slide.mpp)
    n_y, n_x = drawn.values.shape
    x_px, y_px = drawn.grid.x_px(n_x), drawn.grid.y_px(n_y)
    for row, column in np.ndindex(drawn.values.shape):
        at = kept.to_map(*frame.to_l0(x_px[column], y_px[row]))
        assert drawn.values[row, column] == kept.cancer[int(at[1]), int(at[0])]
    corners = frame.to_l0(x_px[0], y_px[0]), frame.to_l0(x_px[-1], y_px[-1])
    assert kept.to_map(*corners[0]) == pytest.approx((1 / 8, 1 / 8))
    n_rows, n_columns = kept.cancer.shape
    assert kept.to_map(*corners[1]) == pytest.approx((n_columns - 1 / 8, n_rows - 1 / 8))


def test_what_had_to_be_annotated_is_said(manifest):
    task = make_task(manifest)
    text = "masks and labels of 2 training slides"
    said = two_stage.annotation(task.config, manifest)
    assert said == f"{text}, masks of 2 validation slides"
    bare = [dataclasses.replace(slide, mask=None) for slide in manifest.records]
    unmasked = dataclasses.replace(manifest, records=tuple(bare))
    assert two_stage.annotation(task.config, unmasked) == text
    plain = load_config([f"dataset.manifest={manifest.path}"])
    assert two_stage.annotation(plain, manifest) == "one label for each of 2 training slides"
    assert two_stage.network_task(create(plain, manifest)).n_outputs == 1
