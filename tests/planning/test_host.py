"""A run that cannot have its memory is refused before it trains, with the numbers."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from umtrain.memory.options import Options
from umtrain.planning.host import Readers, demands
from umtrain.planning.predict import Prediction
from umtrain.planning.profile import load_profile

GIB = 2**30
SMALL = ("res=64", "epochs=1", "dataset.workers=0", "precision=fp32")


def refused(umtrain, slides, tmp_path, *words):
    done = umtrain("fit", *SMALL, f"dataset.manifest={slides}", "run_dir=run", *words, cwd=tmp_path)
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert record["status"] == "oom"
    assert record["train"] is None
    return done.stderr


def test_too_little_host_memory_for_what_is_swapped(umtrain, slides, tmp_path):
    words = ("memory=lms", "memory.host_budget=1MiB")
    text = refused(umtrain, slides, tmp_path, *words)
    assert "memory.host_budget: predicted to need at least" in text
    assert "1.00 MiB" in text
    assert "raise it" in text


def test_a_budget_below_what_the_strategy_can_do_with(umtrain, slides, tmp_path):
    text = refused(umtrain, slides, tmp_path, "memory=vanilla", "memory.device_budget=128MiB")
    assert "memory.device_budget: predicted to need at least" in text
    assert "memory=auto" in text


def demanded(least_bytes: int, readers: Readers, device_bytes: int = 8 * GIB):
    prediction = Prediction("vanilla", fits=True, least_budget_bytes=least_bytes, host_peak_bytes=0)
    profile = dataclasses.replace(load_profile("generic_cpu"), device_bytes=device_bytes)
    return demands(prediction, profile, Options(), readers)


def test_reader_processes_share_the_ram_with_the_step():
    (alone,) = demanded(7 * GIB, Readers(0, GIB))
    (beside,) = demanded(7 * GIB, Readers(2, GIB))
    assert not alone.is_doubtful
    assert beside.is_hopeless
    assert "dataset.workers (now 2)" in beside.text


@given(st.integers(1, 100 * GIB))
def test_what_is_refused_is_doubtful_and_what_fits_is_neither(least_bytes):
    (demand,) = demanded(least_bytes, Readers(0, 0))
    assert demand.is_doubtful or not demand.is_hopeless
    assert demand.is_doubtful == (least_bytes > 8 * GIB)
