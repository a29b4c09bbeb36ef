"""Sessions of one run, one after another, as its record tells of them."""

import json
import subprocess
import sys

import pytest

SMALL = (
    *("res=64", "optim=sgd", "memory=vanilla", "precision=fp32", "dataset.workers=0", "cases=0"),
    *("optim.schedule=constant", "optim.warmup_fraction=0", "device=cpu"),
)

# In one process, with a network that is small: what is tested is around it.
_SESSIONS = """
import contextlib, io, json, shutil, sys
from pathlib import Path

from torch import nn

from umtrain import runner, training
from umtrain.cli import main
from umtrain.errors import Interrupted
from umtrain.tasks.slides import SlideTask

SlideTask.create_model = lambda task, pretrained=None: nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, task.n_outputs)
)
sessions = {}
def session(name, *words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(list(words))
    run = next(word.partition("=")[2] for word in words if word.startswith("run"))
    record = json.loads(Path(run, "metrics.json").read_text())
    sessions[name] = {"code": code, "printed": out.getvalue(), "record": record}

fit = ("fit", *sys.argv[1:])
session("first", *fit, "run_dir=run", "epochs=1")

prune = training.prune
def killed(*arguments):
    prune(*arguments)
    shutil.copytree("run", "killed")
training.prune = killed
session("longer", *fit, "run_dir=run", "epochs=2")
training.prune = prune
sessions["killed"] = {"record": json.loads(Path("killed/metrics.json").read_text())}
session("after the kill", *fit, "run_dir=killed", "epochs=2")

restore = training.Trainer.restore
def interrupted(trainer, path):
    raise Interrupted("interrupted by SIGTERM")
training.Trainer.restore = interrupted
session("not begun", *fit, "run_dir=run", "epochs=3")
training.Trainer.restore = restore

locked = sessions["locked"] = {}
def watched(name):
    function = getattr(runner, name)
    def watch(run_dir, *rest):
        locked[name] = Path(run_dir, ".lock").exists()
        return function(run_dir, *rest)
    setattr(runner, name, watch)
watched("read_record")
watched("_publish")
session("eval", "eval", "run=killed", "split=val")
Path("sessions.json").write_text(json.dumps(sessions))
"""


@pytest.fixture(scope="module")
def sessions(slides, tmp_path_factory):
    """What each session printed and left in the record."""
    folder = tmp_path_factory.mktemp("sessions")
    command = [sys.executable, "-c", _SESSIONS, *SMALL, f"dataset.manifest={slides}"]
    subprocess.run(command, cwd=folder, check=True)
    return json.loads((folder / "sessions.json").read_text())


@pytest.mark.fault("a kill as a finished run trains for longer", "gone on with to its end")
def test_a_run_killed_as_it_trains_for_longer_is_not_over(sessions):
    assert sessions["first"]["record"]["status"] == "ok"
    killed = sessions["killed"]["record"]
    assert (killed["status"], killed["train"]["epochs"]) == ("interrupted", 1)
    why = "the run is under way, or was killed"
    assert (killed["test"], killed["reasons"]["test"]) == (None, why)
    assert killed["reasons"]["status"] == why
    after = sessions["after the kill"]
    assert "resume   after step 8" in after["printed"]
    assert (after["record"]["status"], after["record"]["train"]["epochs"]) == ("ok", 2)


def test_a_run_that_went_well_gives_no_reasons_why_not(sessions):
    for name in ("first", "longer", "after the kill", "eval"):
        assert sessions[name]["code"] == 0
        assert not {"status", "train", "val", "test"} & sessions[name]["record"]["reasons"].keys()


def test_a_session_that_ends_before_it_has_begun_keeps_what_was_known_of_the_training(sessions):
    before, after = sessions["longer"]["record"], sessions["not begun"]["record"]
    assert sessions["not begun"]["code"] == 130
    assert (after["status"], after["reasons"]["status"]) == (
        "interrupted",
        "interrupted by SIGTERM",
    )
    for section in ("train", "throughput", "memory_use", "started_at_s"):
        assert after[section] == before[section]
    assert after["elapsed_s"] > before["elapsed_s"]


def test_eval_has_the_run_to_itself_from_its_record_to_its_report(sessions):
    assert sessions["locked"] == {"read_record": True, "_publish": True}
