"""`umtrain plan` as a user runs it."""

import json
import os
import re

import pytest
import torch

from umtrain.device import device_name
from umtrain.errors import ConfigError
from umtrain.files import write_json
from umtrain.plan_command import parse
from umtrain.planning.calibration import machine_key
from umtrain.planning.profile import load_profile, profile_to_dict

GPU = ("device=a100_80gb", "precision=bf16")


def plan_of(folder):
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture(scope="module")
def calibrated_env(tmp_path_factory):
    """An environment in which this machine has been calibrated: as the generic processor."""
    folder = tmp_path_factory.mktemp("cache")
    device = torch.device("cpu")
    name = f"device-{machine_key(device, device_name(device))}.json"
    write_json(folder / name, profile_to_dict(load_profile("generic_cpu")))
    return {**os.environ, "UMTRAIN_CACHE": str(folder)}


@pytest.fixture(scope="module")
def planned(umtrain, tmp_path_factory):
    """A plan of two sizes under all strategies, and what it printed."""
    folder = tmp_path_factory.mktemp("plan")
    done = umtrain("plan", "res=512,16384", *GPU, "out=out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_every_strategy_is_predicted_at_every_size(planned):
    rows = plan_of(planned[0])["rows"]
    names = {row["strategy"] for row in rows}
    assert names >= {"vanilla", "checkpoint", "vdnn", "lms", "um", "um_group", "stream"}
    assert len(rows) == 2 * len(names)


def test_predictions_say_that_they_are(planned):
    folder, printed = planned
    document = plan_of(folder)
    assert {document["kind"], *(row["kind"] for row in document["rows"])} == {"prediction"}
    assert printed.count("predicted: resnet50") == 2
    assert "predicted, not measured, for NVIDIA A100" in printed


def test_a_picture_is_written(planned):
    assert (planned[0] / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_larger_images_take_more_of_everything(planned):
    rows = plan_of(planned[0])["rows"]
    vanilla = [row for row in rows if row["strategy"] == "vanilla"]
    for key in ("device_peak_bytes", "step_s", "least_budget_bytes"):
        figures = [row[key] for row in vanilla]
        assert figures == sorted(figures)
        assert figures[0] < figures[-1]


def test_what_does_not_fit_says_why_and_auto_takes_what_does(planned):
    folder, printed = planned
    document = plan_of(folder)
    lost = next(
        row for row in document["rows"] if (row["strategy"], row["res"]) == ("vanilla", 16384)
    )
    assert not lost["fits"]
    assert lost["device_peak_bytes"] > document["profile"]["device_bytes"]
    assert f"vanilla: {lost['why']}" in printed
    chosen = re.match(r"memory=auto: (\w+), predicted", document["auto"]["16384"])
    fitting = {row["strategy"] for row in document["rows"] if row["res"] == 16384 and row["fits"]}
    assert chosen[1] in fitting - {"vanilla"}


def test_a_slide_of_any_shape_is_planned_on_a_node(umtrain, tmp_path):
    words = ("res=100000", "dataset.aspect=0.5", "device=v100_node", "memory=stream")
    done = umtrain("plan", *words, "precision=bf16", "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = plan_of(tmp_path / "out")["rows"]
    assert row["input_shape"] == [3, 100000, 49984]
    assert "rows spread over devices" in done.stdout
    # One of its GPUs has not the memory: no step of it that others could do beside it.
    assert not row["fits"]
    assert plan_of(tmp_path / "out")["scaling"]["100000"] == {"strategy": None, "devices": []}


def test_a_node_is_planned_for_as_part_of_many(umtrain, tmp_path):
    words = ("res=512", "device=h100_node", "memory=vanilla", "precision=bf16", "out=out")
    done = umtrain("plan", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scaling = plan_of(tmp_path / "out")["scaling"]["512"]
    assert [row["n_devices"] for row in scaling["devices"]] == [1, 2, 4, 8, 16, 32, 64]
    assert "on each device, memory=vanilla" in done.stdout


def test_an_epoch_takes_as_many_steps_as_the_manifest_has_batches(umtrain, slides, tmp_path):
    words = ("res=256", *GPU, "memory=vanilla", "batch_size=3")
    done = umtrain("plan", *words, f"dataset.manifest={slides}", "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = plan_of(tmp_path / "out")["rows"]
    assert row["epoch_s"] == pytest.approx(2 * row["step_s"])  # four images for training


def test_without_a_manifest_an_epoch_is_null_with_its_reason(planned):
    row = plan_of(planned[0])["rows"][0]
    assert row["epoch_s"] is None
    assert "without dataset.manifest" in row["epoch_why"]


def test_this_machine_is_not_measured_twice(umtrain, calibrated_env, tmp_path):
    words = ("dataset=spine", "res=256", "memory=vanilla", "device=cpu")
    done = umtrain("plan", *words, cwd=tmp_path, env=calibrated_env)
    assert done.returncode == 0, done.stderr
    assert "measuring this machine" not in done.stdout
    assert "predicted: resunet35, 256 x 128, batch 1" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("memory=magic",), "memory=magic: choose all, auto, "),
        (("res=256,512", "seed=1,2"), "a plan takes several values of res only"),
        (("ress=256",), "unknown key 'ress'. Did you mean res or resume?"),
        (("dataset.aspect=wide",), "dataset.aspect=wide: must be a number above 0"),
        (("calibrate=maybe",), "calibrate=maybe: expected true or false"),
    ],
)
def test_wrong_words_are_refused(words, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse(list(words))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("device=k80",), "device=k80 is no device that can be planned for"),
        (("calibrate=true", "device=h200"), "calibrate=true measures this machine"),
    ],
)
def test_a_wrong_device_is_refused_before_anything_is_measured(umtrain, tmp_path, words, text):
    env = {**os.environ, "UMTRAIN_CACHE": str(tmp_path / "cache")}
    done = umtrain("plan", *words, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
