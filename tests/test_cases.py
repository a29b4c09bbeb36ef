"""Single cases with pictures: which, from which maps, into which files."""

import copy
import dataclasses
import io
import json
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console as RichConsole
from torchvision.models.resnet import Bottleneck, ResNet

from umtrain import memory, tasks
from umtrain.cases import (
    SlideMap,
    SlideView,
    choose_films,
    choose_slides,
    file_stem,
    grad_cam_maps,
    remove_cases,
    write_cases,
    write_slide_map,
)
from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.manifest import read_manifest, write_manifest
from umtrain.data.wsi import slide_info
from umtrain.errors import OutOfMemoryError
from umtrain.evaluation.contours import Level, MapGrid
from umtrain.models.norm import BatchNorm2d, FrozenBatchNorm2d, set_eval_statistics
from umtrain.models.resnet import (
    FEATURE_STRIDE_PX,
    FIRST_FEATURE_PX,
    AverageAndMax,
    split_classifier,
)

RES = 128
LEVELS = (Level(0.5, "half", (33, 145, 140)),)


def make_task(name, manifest, *overrides):
    config = load_config(
        [f"dataset={name}", f"res={RES}", f"dataset.manifest={manifest}", *overrides]
    )
    config = dataclasses.replace(config, device="cpu", precision="fp32")
    return tasks.create(config, read_manifest(manifest, name))


def make_console():
    return Console(RichConsole(file=io.StringIO(), width=500))


def said(console):
    return console.rich.file.getvalue()


def create_strategy():
    return memory.create("vanilla")


def slide_rows(task):
    return [
        {"id": slide.id, "split": "train", "label": task.labels[slide.label], "prob": 0.1 * at}
        for at, slide in enumerate(task.manifest.split("train"), 1)
    ]


def made_map(values, view=None):
    grid = MapGrid(FIRST_FEATURE_PX, FIRST_FEATURE_PX, FEATURE_STRIDE_PX)
    values, view = np.asarray(values, np.float32), view or SlideView(RES)
    return SlideMap(values, 1.0, view, grid, LEVELS, "meaning", "Words.")


def some_map(slide_id):
    return made_map(np.eye(4))


@pytest.fixture(scope="module")
def small():
    """A ResNet of one block a stage, in which every layer has a part in the output."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=1, norm_layer=BatchNorm2d)
    model.avgpool = AverageAndMax()
    return livened(model).eval()


def livened(model):
    """Undo that residual branches begin at 0 and statistics at 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1, generator=generator)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.0, generator=generator)
    return model


@pytest.mark.parametrize("statistics", ["image", "running"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vanilla", {}),
        ("stream", {"device_budget": "1GiB"}),
        ("auto", {"device_budget": "100MiB"}),
    ],
)
def test_the_map_that_is_explained_is_the_one_the_prediction_came_from(
    name, options, statistics, small
):
    model = copy.deepcopy(small).double()
    set_eval_statistics(model, statistics)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    backbone, head = split_classifier(model)
    strategy = memory.create(name, **options)
    try:
        with torch.no_grad():
            features = strategy.prepare_inference(backbone, x)(x)
            torch.testing.assert_close(head(features), model(x), rtol=1e-9, atol=1e-9)
    finally:
        strategy.close()
    assert features.shape == (1, 2048, 2, 2)


def test_a_split_network_keeps_the_mode_of_each_layer():
    model = ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d).train()
    modes = [module.training for module in model.modules()]
    split_classifier(model)
    assert [module.training for module in model.modules()] == modes


def test_positions_of_the_last_map_look_at_the_pixels_they_are_said_to(small):
    model = copy.deepcopy(small)
    for name, module in model.named_modules():
        if name.endswith("bn3"):  # without residual branches it looks at 11 pixels a side
            torch.nn.init.zeros_(module.weight)
    backbone, _ = split_classifier(model)
    x = torch.randn(1, 3, 160, 160).requires_grad_()
    (gradient,) = torch.autograd.grad(backbone(x)[0, :, 2, 3].sum(), x)
    rows, columns = torch.nonzero(gradient.abs().sum((0, 1)), as_tuple=True)
    for seen, at in ((rows, 2), (columns, 3)):
        # The middle of pixels [first, last + 1).
        middle = (seen.min() + seen.max() + 1).item() / 2
        assert middle == pytest.approx(FIRST_FEATURE_PX + FEATURE_STRIDE_PX * at, abs=1)


def test_slides_come_worst_last_of_all_with_the_surest_right_one_first():
    rows = [
        {"id": name, "label": label, "prob": prob}
        for name, label, prob in [
            *(("d", 1, 0.9), ("c", 1, 0.9), ("b", 0, 0.8), ("a", 1, 0.2), ("e", 0, 0.3))
        ]
    ]
    chosen = choose_slides(rows, 3, 0.5)
    assert [case.row["id"] for case in chosen] == ["c", "a", "b", "e"]
    assert chosen[0].why == "Most confident correct positive"
    assert chosen[1].why == "Worst 1 of 3"
    above = choose_slides(rows, 1, 0.95)
    assert [case.row["id"] for case in above] == ["a"]  # the worst is the first positive, too
    assert len(choose_slides(rows, 9, 0.5)) == 5


def test_films_come_in_the_order_of_their_errors():
    rows = [
        {"id": name, "sva_true_mm": 10.0, "sva_pred_mm": found}
        for name, found in (("a", 11.0), ("c", 4.0), ("b", 16.0), ("d", 10.0))
    ]
    assert [case.row["id"] for case in choose_films(rows, 3)] == ["b", "c", "a"]


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.lists(st.floats(0, 1), min_size=6))
def test_two_runs_on_the_same_slides_have_a_case_in_common(one, other):
    def chosen(probs):
        rows = [{"id": f"s{at}", "label": at % 2, "prob": probs[at]} for at in range(6)]
        return {case.row["id"] for case in choose_slides(rows, 1, 0.5)}

    assert chosen(one) & chosen(other)


def test_two_runs_on_the_same_films_have_a_case_in_common():
    def chosen(worst):
        rows = [
            {"id": name, "sva_true_mm": 0.0, "sva_pred_mm": 9.0 if name == worst else 1.0}
            for name in "abc"
        ]
        return [case.row["id"] for case in choose_films(rows, 1)]

    assert (chosen("b"), chosen("c"), chosen("a")) == (["b", "a"], ["c", "a"], ["a"])


IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.text("ab/=%.", min_size=1)


@given(IDS)
def test_a_name_stays_in_its_folder(record_id):
    name = file_stem("test", record_id)
    assert not set(name) & set('/\\:*?"<>|%# \0')
    assert len(name) < 220
    assert name.isascii()


@given(st.lists(IDS, unique=True))
def test_two_ids_have_two_names(ids):
    assert len({file_stem("test", record_id) for record_id in ids}) == len(ids)


def test_long_ids_that_end_differently_have_two_names():
    assert file_stem("test", "x" * 500 + "1") != file_stem("test", "x" * 500 + "2")
    assert file_stem("test", "slide_0003") == "test-slide_0003"


def test_slides_get_a_picture_a_map_and_contours(slides, small, tmp_path):
    task = make_task("wsi", slides)
    model = copy.deepcopy(small).train()
    console = make_console()
    maps = grad_cam_maps(task, model, "train", create_strategy)
    rows = slide_rows(task)
    cases = write_cases(task, "train", rows, tmp_path, console, maps, n_cases=1, threshold=0.1)
    assert len(cases) == 2
    assert model.training
    info = {slide.id: slide_info(slide.path) for slide in task.manifest.records}
    for case in cases:
        place = tmp_path / case["picture"]
        with Image.open(place) as picture:
            assert picture.width > 800
        assert place.stat().st_size < 400_000
        values = np.load(place.with_suffix(".npy"))
        assert values.shape == (4, 4)
        assert values.dtype == np.float32
        assert case["id"] in case["caption"]
        found = json.loads(place.with_suffix(".geojson").read_text())
        assert len(found["features"]) > 0
        for feature in found["features"]:
            for ring in feature["geometry"]["coordinates"]:
                assert np.min(ring) >= 0
                assert (np.max(ring, axis=0) <= (info[case["id"]].width_px,) * 2).all()
        assert "not a probability" in case["caption"]


def test_contours_lie_on_the_slide_where_the_map_says(slides, tmp_path):
    task = make_task("wsi", slides)
    slide = task.manifest.records[0]
    values = np.zeros((4, 4))
    values[1, 2] = 1
    write_slide_map(tmp_path / "case", slide, made_map(values), "a title")
    (feature,) = json.loads((tmp_path / "case.geojson").read_text())["features"]
    l0_per_px = slide_info(slide.path).width_px / RES
    corners = np.array(feature["geometry"]["coordinates"][0])
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    np.testing.assert_allclose(middle, l0_per_px * np.array([64.5, 32.5]), atol=0.01)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_part_of_a_slide_is_drawn_as_the_network_saw_it(slides, tmp_path, fit):
    slide = read_manifest(slides, "wsi").records[0]
    info = slide_info(slide.path)
    scale = 2.5 if fit == "pad" else 1.5
    view = SlideView(RES, fit, info.mpp * scale)
    write_slide_map(tmp_path / "case", slide, made_map(np.ones((4, 4)), view), "")
    (feature,) = json.loads((tmp_path / "case.geojson").read_text())["features"]
    side = min(info.width_px, RES * scale)
    size = np.ptp(feature["geometry"]["coordinates"][0], axis=0)
    np.testing.assert_allclose(size, side, atol=0.02)


def test_a_map_of_zeros_has_no_contours_and_a_caption_that_says_so(slides, small, tmp_path):
    task = make_task("wsi", slides)
    model = copy.deepcopy(small)
    torch.nn.init.constant_(model.fc.weight, -1.0)
    maps = grad_cam_maps(task, model, "train", create_strategy)
    (case,) = write_cases(
        task, "train", slide_rows(task), tmp_path, make_console(), maps, n_cases=1, threshold=1.1
    )
    place = tmp_path / case["picture"]
    assert json.loads(place.with_suffix(".geojson").read_text())["features"] == []
    assert "0 everywhere" in case["caption"]
    assert "It has no contours" in case["caption"]


def test_files_of_an_earlier_evaluation_of_the_split_go_and_others_stay(tmp_path):
    (tmp_path / "cases").mkdir()
    for name in ("train-old.png", "val-old.png"):
        (tmp_path / "cases" / name).touch()
    remove_cases(tmp_path, "train")
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["val-old.png"]


def test_a_slide_that_is_gone_is_left_out_with_the_reason(slides, tmp_path):
    manifest = read_manifest(slides, "wsi")
    records = [
        dataclasses.replace(record, path=tmp_path / "gone.tiff") if at == 0 else record
        for at, record in enumerate(manifest.records)
    ]
    write_manifest(tmp_path / "manifest.csv", "wsi", records)
    task = make_task("wsi", tmp_path / "manifest.csv")
    rows, console = slide_rows(task), make_console()
    cases = write_cases(
        task, "train", rows, tmp_path, console, nullcontext(some_map), n_cases=len(rows)
    )
    assert len(cases) == len(rows) - 1
    assert f"case {records[0].id} of split train is left out" in said(console)
    assert "gone.tiff" in said(console)


def test_memory_that_runs_out_costs_a_case_and_not_the_run(slides, tmp_path):
    task, console = make_task("wsi", slides), make_console()

    def explain(slide_id):
        raise OutOfMemoryError("device memory ran out")

    cases = write_cases(
        task, "train", slide_rows(task), tmp_path, console, nullcontext(explain), n_cases=1
    )
    assert cases == []
    assert "device memory ran out" in said(console)


def test_memory_that_runs_out_before_the_first_case_costs_no_run_either(slides, tmp_path):
    task, console = make_task("wsi", slides), make_console()

    @contextmanager
    def maps():
        raise OutOfMemoryError("device memory ran out")
        yield

    cases = write_cases(task, "train", slide_rows(task), tmp_path, console, maps(), n_cases=1)
    assert cases == []
    assert "no cases of split train are drawn: device memory ran out" in said(console)


def test_odd_ids_have_files_of_their_own_in_the_folder(slides, tmp_path):
    manifest = read_manifest(slides, "wsi")
    odd = ["../../up", "a/b", "a_b", "Folie ä$\\frac{"]
    names = iter(odd)
    records = [
        dataclasses.replace(record, slide_id=next(names, record.id))
        for record in manifest.records
        if record.split == "train"
    ]
    write_manifest(tmp_path / "manifest.csv", "wsi", records)
    task = make_task("wsi", tmp_path / "manifest.csv")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rows = [row for row in slide_rows(task) if row["id"] in odd]
    cases = write_cases(
        task, "train", rows, run_dir, make_console(), nullcontext(some_map), n_cases=4
    )
    assert sorted(case["id"] for case in cases) == sorted(odd)
    assert len({case["picture"] for case in cases}) == len(odd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.csv", "run"]
    assert len(list((run_dir / "cases").glob("*.png"))) == len(odd)


@contextmanager
def never_entered():
    pytest.fail("radiographs have no maps")
    yield


def test_films_show_true_and_predicted_keypoints(radiographs, tmp_path):
    task = make_task("spine", radiographs)
    films = task.manifest.split("train")
    rows = [
        {
            "id": film.id,
            "c7_x_true": film.c7_x,
            "c7_y_true": film.c7_y,
            "s1_x_true": film.s1_x,
            "s1_y_true": film.s1_y,
            "c7_x_pred": film.c7_x + 10 * at,
            "c7_y_pred": film.c7_y,
            "s1_x_pred": film.s1_x,
            "s1_y_pred": film.s1_y,
            "sva_true_mm": 0.0,
            "sva_pred_mm": 5.0 * at,
            "mm_per_px": 0.5,
            "row_mm_per_px": 0.5,
            "facing": "right",
        }
        for at, film in enumerate(films)
    ]
    cases = write_cases(task, "train", rows, tmp_path, make_console(), never_entered(), n_cases=2)
    worst = rows[-1]
    assert [case["id"] for case in cases] == [worst["id"], rows[-2]["id"], rows[0]["id"]]
    assert f"error {worst['sva_pred_mm']:.1f} mm" in cases[0]["caption"]
    for case in cases:
        place = tmp_path / case["picture"]
        assert place.stat().st_size < 400_000
        with Image.open(place) as picture:
            assert 500 < picture.height <= 1000
