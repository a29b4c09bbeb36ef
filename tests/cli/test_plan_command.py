"""`umtrain plan` as a user runs it."""

import json
import os
import re
import subprocess
import sys

import psutil
import pytest
import torch

from umtrain.compiler import cpp_compiler
from umtrain.console import Console
from umtrain.device import device_name
from umtrain.errors import ConfigError
from umtrain.files import write_json
from umtrain.plan_command import parse, plan
from umtrain.plan_subject import resized, split_words, with_rows
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


def test_an_epoch_trains_and_validates_as_many_batches_as_the_manifest_has(
    umtrain, slides, tmp_path
):
    words = ("res=256", *GPU, "memory=vanilla", "batch_size=3")
    done = umtrain("plan", *words, f"dataset.manifest={slides}", "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = plan_of(tmp_path / "out")["rows"]
    # Four images for training; two for validation, in one batch that has no backward.
    assert 2 * row["step_s"] < row["epoch_s"] < 3 * row["step_s"]


def test_a_volume_is_spread_by_its_slices(tmp_path, capsys):
    words = ("dataset=ct", "res=64", "device=v100_node", "memory=stream", f"out={tmp_path}")
    assert plan([*words, "memory.device_budget=700MiB"], Console()) == 0
    assert "rows spread over devices" in capsys.readouterr().out
    whole = split_words(["dataset=ct"]).planned(load_profile("v100_node"))
    half = with_rows(whole, 16)
    assert (whole.input_shape, half.input_shape) == ((1, 32, 96, 96), (1, 16, 96, 96))
    sample = half.subject.sample_batch
    assert sample.is_contiguous(memory_format=torch.channels_last_3d)
    assert half.subject.trace().saved_bytes < 0.6 * whole.subject.trace().saved_bytes


@pytest.mark.parametrize(("optim", "n_states"), [("adamw", 2), ("sgd", 1)])
def test_the_optimizer_s_state_is_the_chosen_one_s(optim, n_states):
    planned = split_words(["dataset=spine", "res=128", f"optim={optim}"]).planned(
        load_profile("v100_32gb")
    )
    trace = planned.subject.trace()
    (state,) = [each for each in trace.allocations if each.kind == "state"]
    learned = sum(p.nbytes for p in planned.subject.model.parameters())
    assert state.n_bytes == n_states * learned


def test_the_network_of_a_plan_takes_no_memory_and_no_time_to_initialise():
    planned = split_words(["dataset=ct", "model=resnet101_3d"]).planned(load_profile("v100_32gb"))
    before = psutil.Process().memory_info().rss
    again = split_words(["dataset=ct", "model=resnet101_3d"]).planned(load_profile("v100_32gb"))
    weights = sum(p.nbytes for p in again.subject.model.parameters())
    assert psutil.Process().memory_info().rss - before < weights / 4
    places = {p.data_ptr() for p in again.subject.model.parameters()}
    assert len(places) == len(list(planned.subject.model.parameters()))


def test_another_size_is_the_same_network_on_another_input():
    first = split_words(["dataset=spine"]).planned(load_profile("v100_32gb"), "res=128")
    other = resized(first, res=256, batch_size=2)
    assert other.subject.model is first.subject.model
    built = split_words(["dataset=spine"]).planned(
        load_profile("v100_32gb"), "res=256", "batch_size=2"
    )
    assert other.subject.trace() == built.subject.trace()
    assert other.title == built.title


def test_a_strategy_that_is_named_is_what_the_configuration_is_checked_with():
    words = ("parallel=spatial", "device=h100_node")
    assert parse([*words, "memory=stream"]).strategies == ("stream",)
    for memory in ("memory=lms", "memory=all"):
        with pytest.raises(ConfigError, match=r"parallel=spatial .*add memory=stream"):
            parse([*words, memory])


def test_auto_plans_all_strategies():
    assert parse(["memory=auto"]).strategies == parse(["memory=all"]).strategies


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


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
def test_without_a_compiler_a_step_takes_no_more_than_the_plan_that_says_so(
    umtrain, calibrated_env, tmp_path
):
    words = ("dataset=spine", "res=1024", "precision=fp32", "device=cpu", "memory=vanilla")
    without_pool = calibrated_env | {"CXX": str(tmp_path / "no-compiler")}
    planned = {}
    for name, env in (("pool", calibrated_env), ("heap", without_pool)):
        done = umtrain("plan", *words, f"out={name}", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        assert ("there is no page pool here" in done.stdout) == (name == "heap")
        (row,) = plan_of(tmp_path / name)["rows"]
        planned[name] = row["device_peak_bytes"]
    trial = [sys.executable, "-m", "umtrain.trial", "2", "0", *words]
    done = subprocess.run(trial, env=without_pool, capture_output=True, text=True, check=True)
    took = json.loads(done.stdout.splitlines()[-1])["memory_use"]["device_peak_bytes"]
    assert planned["pool"] < took <= planned["heap"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("memory=magic",), "memory=magic: choose all, auto, vanilla, "),
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
        (
            ("res=100000", "dataset.aspect=5000"),
            "dataset.aspect=5000 batch_size=1: a batch of more",
        ),
        (("calibrate=true", "device=h200"), "calibrate=true measures this machine"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_measured(umtrain, tmp_path, words, text):
    env = {**os.environ, "UMTRAIN_CACHE": str(tmp_path / "cache")}
    done = umtrain("plan", *words, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
