"""What `umtrain fit` makes of a machine that fails: its GPU, the rights of a folder, its clock."""

import csv
import ctypes
import json
import re
import subprocess
import sys
import time

import pytest

from umtrain.checkpoint import load_checkpoint, step_path
from umtrain.cli import main

SMALL = (
    *("fit", "model=resnet18", "res=64", "optim=sgd", "memory=vanilla", "precision=fp32"),
    *("dataset.workers=0", "cases=0", "run_dir=run"),
)
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1

# Sessions of one run, in one process: its clock goes back by three hours whenever it is read.
_SESSIONS = """
import contextlib, io, json, os, sys, time
from pathlib import Path

now_s, reads = time.time, iter(range(10**9))
time.time = lambda: now_s() - 10800 * next(reads)

import torch
from umtrain import training
from umtrain.cli import main

network_input, batches = training.network_input, iter(range(1, 1000))
def gone(*arguments):
    # Four batches of an epoch, two of its validation: this is in the second step of the next.
    if next(batches) == 8:
        raise torch.AcceleratorError("CUDA error: device is lost")
    return network_input(*arguments)

sessions, run, checkpoints = {}, Path("run"), Path("run/checkpoints")
def session(name, *changes):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main([*sys.argv[1:], *changes])
    record = Path("run/metrics.json")
    sessions[name] = {
        "code": code,
        "printed": out.getvalue(),
        "errors": errors.getvalue(),
        "record": json.loads(record.read_text()) if record.exists() else None,
        "files": sorted(map(str, run.rglob("*"))),
    }

run.mkdir(mode=0o555)
session("read-only")
run.chmod(0o755)
training.network_input = gone
session("no GPU")
training.network_input = network_input
# By its time the older checkpoint is the newer one.
os.utime(checkpoints / "step-00000005.pt", (0, 0))
checkpoints.chmod(0o555)
session("turned read-only")
checkpoints.chmod(0o755)
session("well")
session("no number", "run_dir=other", "optim.lr=1e30")
Path("sessions.json").write_text(json.dumps(sessions))
"""


def bound_by_rights():
    """Let the rights of files bind the command, root's too."""
    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.fixture(scope="module")
def faulty(slides, tmp_path_factory):
    """A run that met fault after fault, and was gone on with after each.

    Return its folder, what each of its sessions came to, and the seconds that all took.
    """
    folder = tmp_path_factory.mktemp("faults")
    words = (*SMALL, "epochs=2", "checkpoint_minutes=0", f"dataset.manifest={slides}")
    began_s = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", _SESSIONS, *words],
        cwd=folder,
        check=True,
        preexec_fn=bound_by_rights,
    )
    took_s = time.monotonic() - began_s
    return folder, json.loads((folder / "sessions.json").read_text()), took_s


@pytest.mark.fault("a read-only run directory", "exit 2 before training, nothing written")
def test_a_read_only_run_directory_is_named_before_anything_is_written(faulty):
    session = faulty[1]["read-only"]
    assert session["code"] == 2
    assert session["errors"] == (
        "umtrain: run: cannot be written (Permission denied); make it writable, or name another "
        "folder\n"
    )
    assert session["files"] == []


@pytest.mark.fault("a GPU gone in mid-step", "exit 2, gone on with from the last step")
def test_a_gpu_that_goes_ends_in_one_line(faulty):
    session = faulty[1]["no GPU"]
    assert session["code"] == 2
    assert session["errors"] == (
        "umtrain: the GPU failed (CUDA error: device is lost); see `nvidia-smi` and the system's "
        "log, then start the run again: it goes on from its last checkpoint\n"
    )
    assert session["record"]["status"] == "failed"


@pytest.mark.fault("a run directory that turns read-only", "exit 2, gone on with once writable")
def test_a_folder_that_turns_read_only_costs_nothing_that_was_saved(faulty):
    session = faulty[1]["turned read-only"]
    assert session["code"] == 2
    said = (
        r"umtrain: \S*run/checkpoints/\S+\.pt: the checkpoint could not be written \(Permission "
        r"denied\); earlier ones are whole\. Make that folder writable, then start the run again: "
        r"it goes on from the last one\n"
    )
    assert re.fullmatch(said, session["errors"])
    assert [name for name in session["files"] if "step-" in name] == [
        f"run/checkpoints/step-0000000{step}.pt" for step in (4, 5)
    ]
    assert not [name for name in session["files"] if "/." in name]


@pytest.mark.fault("a clock that goes back", "gone on with by step, no figure below zero")
def test_a_clock_that_goes_back_changes_no_figure_and_no_order(faulty):
    folder, sessions, took_s = faulty
    session, record = sessions["well"], sessions["well"]["record"]
    assert session["code"] == 0, session["errors"]
    assert "resume   after step 5" in sessions["turned read-only"]["printed"]
    assert "resume   after step 5" in session["printed"]
    assert record["started_at_s"] == sessions["no GPU"]["record"]["started_at_s"]
    assert 0 < record["elapsed_s"] < took_s
    assert re.search(r"^took     \d+(\.\d s| min \d\d s)$", session["printed"], re.MULTILINE)
    assert 0 < record["throughput"]["step_s"]["mean"] < took_s
    assert record["throughput"]["images_per_s"]["mean"] > 0
    with (folder / "run" / "steps.csv").open() as stream:
        steps = list(csv.DictReader(stream))
    assert [int(step["step"]) for step in steps] == list(range(1, 9))
    assert all(0 < float(step["step_s"]) < took_s for step in steps)
    assert all(0 <= float(step["data_wait_s"]) < took_s for step in steps)
    assert load_checkpoint(step_path(folder / "run" / "checkpoints", 8))["step"] == 8


@pytest.mark.fault("a loss that is no number", "exit 2, step and image named")
def test_a_loss_that_is_no_number_ends_in_one_line(faulty):
    folder, sessions, _ = faulty
    session = sessions["no number"]
    assert session["code"] == 2
    named = (
        r"umtrain: the loss became (nan|inf) at step \d on slide\S+; try a smaller optim\.lr .*\n"
    )
    assert re.fullmatch(named, session["errors"])
    assert json.loads((folder / "other" / "metrics.json").read_text())["status"] == "failed"


@pytest.mark.fault("a run directory that cannot be made", "exit 2 before training")
def test_a_run_directory_that_cannot_be_made_is_named(slides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*SMALL, f"dataset.manifest={slides}", "run_dir=file/below"]) == 2
    assert capsys.readouterr().err == (
        "umtrain: file/below: cannot be made (Not a directory); name a folder that can, with "
        "run_dir=\n"
    )


@pytest.mark.fault("a GPU that is not there", "exit 2 before training, nothing written")
def test_a_gpu_that_is_not_there_is_named(slides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*SMALL, "device=cuda", f"dataset.manifest={slides}"]) == 2
    assert capsys.readouterr().err == (
        "umtrain: device=cuda: torch finds no usable GPU; use device=cpu, or see `umtrain doctor`\n"
    )
    assert not list(tmp_path.iterdir())


# A spill disk on which nothing has room. Then the disk of a run: the first epoch's checkpoint and
# its weights fit, the second's does not; then there is more room.
_SMALL_DISKS = """
import subprocess, sys
from umtrain.cli import main

words = sys.argv[1:]
print("exit", main([*words, "run_dir=other", "memory=lms", "memory.spill_dir=spill"]), flush=True)
print("exit", main(words), flush=True)
subprocess.run(["mount", "-o", "remount,size=450m", "run"], check=True)
print("exit", main(words))
"""


@pytest.fixture(scope="module")
def small_disks(slides, tmp_path_factory, in_own_mounts):
    """The process that trained on disks that were too small, and then on a larger one."""
    folder = tmp_path_factory.mktemp("disks")
    for name in ("run", "spill"):
        (folder / name).mkdir()
    mounts = "mount -t tmpfs -o size=1m none spill && mount -t tmpfs -o size=150m none run"
    words = (*SMALL, "epochs=2", f"dataset.manifest={slides}")
    return in_own_mounts(mounts, sys.executable, "-c", _SMALL_DISKS, *words, cwd=folder)


@pytest.mark.fault("a checkpoint on a full disk (tmpfs)", "exit 2, gone on with once there is room")
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(small_disks):
    done = small_disks
    assert re.findall(r"^exit (\d)$", done.stdout, re.MULTILINE)[1:] == ["2", "0"], done.stderr
    error = "step-00000008.pt: the checkpoint could not be written (No space left on device)"
    assert error in done.stderr.splitlines()[1]
    assert "Free some of that disk" in done.stderr
    assert "resume   after step 4" in done.stdout
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.fault("a spill disk that is too small (tmpfs)", "exit 3 before training")
def test_a_spill_disk_that_is_too_small_is_named(small_disks):
    assert re.findall(r"^exit (\d)$", small_disks.stdout, re.MULTILINE)[0] == "3"
    said = "the spill file's disk: predicted to need at least"
    assert said in small_disks.stderr.splitlines()[0]
