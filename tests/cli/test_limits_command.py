"""`umtrain limits` as a user runs it: by plan, and with real steps."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from umtrain import models, plan_command
from umtrain.config import check_config, load_config
from umtrain.console import Console
from umtrain.device import device_name
from umtrain.errors import ConfigError
from umtrain.limits_command import Axis, limits
from umtrain.plan_subject import split_words
from umtrain.planning import subject
from umtrain.planning.predict import predict
from umtrain.planning.profile import load_profile

GPU = ("device=a100_80gb", "precision=bf16")
SLIDES = (*GPU, "model=resnet18")
TRIAL = ("dataset=spine", "dataset.aspect=0.5", "precision=fp32", "measure=true", "device=cpu")


def limits_of(folder):
    document = json.loads((folder / "limits.json").read_text())
    return document, {row["strategy"]: row["largest"] for row in document["rows"]}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The limits of two strategies on a GPU with little memory, and all that was made for them."""
    folder = tmp_path_factory.mktemp("limits")
    made = Made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "create", made.counted("networks", models.create))
        patch.setattr(subject, "trace_step", made.counted("traces", subject.trace_step))
        for memory in ("vanilla", "checkpoint"):
            words = (f"memory={memory}", "memory.device_budget=1GiB", f"out={folder / memory}")
            assert limits([*SLIDES, *words], Console()) == 0
    return folder, made


class Made:
    """How often something was called."""

    def __init__(self):
        self.n = {}

    def counted(self, name, function):
        def call(*arguments, **keywords):
            self.n[name] = self.n.get(name, 0) + 1
            return function(*arguments, **keywords)

        return call


def test_the_limit_fits_and_the_next_size_does_not(planned):
    document, largest = limits_of(planned[0] / "vanilla")
    assert document["kind"] == "prediction"
    res = largest["vanilla"]
    profile = load_profile("a100_80gb")
    words = split_words([*SLIDES, "memory.device_budget=1GiB"], "vanilla")
    at = [words.planned(profile, f"res={size}") for size in (res, res + 32)]
    found = [predict(each.subject, "vanilla", profile, each.options) for each in at]
    assert [each.fits for each in found] == [True, False]
    assert document["rows"][0]["device_peak_bytes"] == found[0].device_peak_bytes


def test_recomputing_takes_larger_images(planned):
    _, vanilla = limits_of(planned[0] / "vanilla")
    _, checkpoint = limits_of(planned[0] / "checkpoint")
    assert checkpoint["checkpoint"] > vanilla["vanilla"]
    assert (planned[0] / "vanilla" / "limits.png").read_bytes().startswith(b"\x89PNG")


def test_each_time_one_network_is_made_and_few_sizes_are_traced(planned):
    n = planned[1].n
    assert n["networks"] == 2
    assert n["traces"] <= 6 + 2 * 6  # of recomputing a step of its own, beside the ordinary one


def test_what_was_looked_at_is_written_down(planned):
    document, _ = limits_of(planned[0] / "vanilla")
    found = {key: document[key] for key in ("of", "dataset", "batch_size", "aspect", "device")}
    assert found == {
        "of": "res",
        "dataset": "wsi",
        "batch_size": 1,
        "aspect": 1.0,
        "device": "a100_80gb",
    }
    assert "A100" in document["device_name"]


def test_the_largest_batch_is_found_too(tmp_path):
    words = ("dataset=ct", "res=32", "of=batch_size", "memory=vanilla", "dataset.aspect=0.5")
    limits([*GPU, *words, "memory.device_budget=1GiB", f"out={tmp_path}"], Console())
    document, largest = limits_of(tmp_path)
    assert largest["vanilla"] > 1
    assert (document["res"], document["aspect"]) == (32, 0.5)


@pytest.mark.parametrize(
    ("words", "least", "step"),
    [
        (["dataset=wsi"], 64, 32),
        (["dataset=spine"], 128, 64),
        (["dataset=ct"], 32, 4),
        (["dataset=ct", "dataset.depth=16"], 36, 4),
    ],
)
def test_sizes_are_those_that_the_dataset_takes(words, least, step):
    config = load_config(words)
    axis = Axis.of("res", config)
    assert (axis.least, axis.step) == (least, step)
    for size in (axis.least, axis.least + axis.step, axis.most // step * step):
        check_config(dataclasses.replace(config, res=size))


def test_batches_end_where_their_pixels_are_beyond_every_memory():
    config = load_config(["res=100000"])
    axis = Axis.of("batch_size", config)
    check_config(dataclasses.replace(config, batch_size=axis.most))


def test_the_spill_disk_that_counts_is_the_one_that_is_named(tmp_path, monkeypatch):
    asked = []

    def named(name, console, *, again, spill_dir):
        asked.append(spill_dir)
        return load_profile("v100_32gb")

    monkeypatch.setattr(plan_command, "resolve_profile", named)
    words = ("dataset=ct", "res=32", "of=batch_size", "memory=vanilla", "device=cpu")
    limits(
        [*words, "memory.device_budget=1GiB", f"memory.spill_dir={tmp_path}", f"out={tmp_path}"],
        Console(),
    )
    assert asked == [tmp_path]


def test_rows_are_spread_by_a_strategy_that_can():
    with pytest.raises(ConfigError, match=r"parallel=spatial .*add memory=stream"):
        limits([*GPU, "parallel=spatial", "memory=lms"], Console())


def test_with_measure_real_steps_decide(tmp_path, capsys):
    words = ("of=batch_size", "res=256", "memory=vanilla", "memory.device_budget=134MiB")
    assert limits([*TRIAL, *words, f"out={tmp_path}"], Console()) == 0
    printed = capsys.readouterr().out
    document, largest = limits_of(tmp_path)
    assert document["kind"] == "measurement"
    assert document["device_name"] == device_name(torch.device("cpu"))
    assert f"vanilla batch_size={largest['vanilla']}: fits, a step" in printed
    assert f"vanilla batch_size={largest['vanilla'] + 1}: does not fit" in printed
    assert "measured: largest batch_size" in printed


def test_what_does_not_fit_at_all_is_a_row_with_its_reason(tmp_path):
    words = ("memory=vanilla", "memory.device_budget=64MiB", f"out={tmp_path}")
    assert limits([*TRIAL, *words], Console()) == 0
    document, largest = limits_of(tmp_path)
    assert largest["vanilla"] is None
    assert "memory" in document["rows"][0]["why"]


def test_an_interrupt_ends_the_try_that_is_under_way(tmp_path):
    words = ("limits", *TRIAL, "memory=vanilla", "of=batch_size", "res=1024")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "umtrain", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run that a shell has put into the background ignores the interrupt, and so do its
        # children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    try:
        assert "training" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert complaint == "umtrain: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("of=lr",), "of=lr: choose res or batch_size"),
        (("res=512",), "res: is what is looked for"),
        (("of=batch_size", "batch_size=2"), "batch_size: is what is looked for"),
        (("measure=perhaps",), "measure=perhaps: expected true or false"),
        (("measure=true", "device=h200"), "measure=true runs real steps on this machine"),
        (("of=batch_size", "res=256,512"), "res=256,512: limits takes one value"),
        (("measure=true", "dataset.aspect=0.5"), "dataset.aspect=0.5: slides are trained on as sq"),
        (("memory=auto",), "memory=auto: takes another strategy at another size"),
        (("measure=true", "calibrate=true"), "calibrate=true: measure=true predicts nothing"),
    ],
)
def test_wrong_words_are_refused(words, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        limits(list(words), Console())
