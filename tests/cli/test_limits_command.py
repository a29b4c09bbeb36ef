"""`umtrain limits` as a user runs it: by plan, and with real steps."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from umtrain.console import Console
from umtrain.errors import ConfigError
from umtrain.limits_command import limits

GPU = ("device=a100_80gb", "precision=bf16")
TRIAL = ("dataset=spine", "dataset.aspect=0.5", "precision=fp32", "measure=true", "device=cpu")


def limits_of(folder):
    document = json.loads((folder / "limits.json").read_text())
    return document, {row["strategy"]: row["largest"] for row in document["rows"]}


@pytest.fixture(scope="module")
def planned(umtrain, tmp_path_factory):
    """The limits of two strategies on a GPU with little memory to use."""
    folder = tmp_path_factory.mktemp("limits")
    found = {}
    for memory in ("vanilla", "checkpoint"):
        words = (f"memory={memory}", "memory.device_budget=1GiB", f"out={memory}")
        done = umtrain("limits", *GPU, *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        found[memory] = folder / memory
    return found


def test_the_limit_fits_and_the_next_size_does_not(planned, umtrain, tmp_path):
    document, largest = limits_of(planned["vanilla"])
    assert document["kind"] == "prediction"
    res = largest["vanilla"]
    assert res % 64 == 0
    words = (*GPU, "memory=vanilla", "memory.device_budget=1GiB", f"res={res},{res + 64}")
    done = umtrain("plan", *words, "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "plan.json").read_text())["rows"]
    assert [row["fits"] for row in rows] == [True, False]


def test_recomputing_takes_larger_images(planned):
    _, vanilla = limits_of(planned["vanilla"])
    _, checkpoint = limits_of(planned["checkpoint"])
    assert checkpoint["checkpoint"] > vanilla["vanilla"]
    assert (planned["vanilla"] / "limits.png").read_bytes().startswith(b"\x89PNG")


def test_the_largest_batch_is_found_too(umtrain, tmp_path):
    words = ("of=batch_size", "res=256", "memory=vanilla", "memory.device_budget=1GiB", "out=out")
    done = umtrain("limits", *GPU, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert limits_of(tmp_path / "out")[1]["vanilla"] > 1


def test_with_measure_real_steps_decide(umtrain, tmp_path):
    words = ("memory=vanilla", "memory.device_budget=108MiB", "out=out")
    done = umtrain("limits", *TRIAL, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document, largest = limits_of(tmp_path / "out")
    assert document["kind"] == "measurement"
    assert f"vanilla res={largest['vanilla']}: fits, a step" in done.stdout
    assert f"vanilla res={largest['vanilla'] + 64}: does not fit" in done.stdout
    assert "measured: largest res" in done.stdout


def test_what_does_not_fit_at_all_is_a_row_with_its_reason(umtrain, tmp_path):
    words = ("memory=vanilla", "memory.device_budget=64MiB", "out=out")
    done = umtrain("limits", *TRIAL, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document, largest = limits_of(tmp_path / "out")
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
    ],
)
def test_wrong_words_are_refused(words, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        limits(list(words), Console())
