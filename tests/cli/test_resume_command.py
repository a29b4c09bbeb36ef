"""Runs that are killed or interrupted, as a user has them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from umtrain.checkpoint import load_checkpoint, step_paths
from umtrain.cli import main
from umtrain.config import load_config
from umtrain.job import is_unfinished
from umtrain.run_dir import write_config
from umtrain.sweep import plan_jobs

KILL_TEST = Path(__file__).parents[2] / "scripts" / "kill_test.py"
SMALL = (
    *("fit", "model=resnet18", "res=64", "optim=sgd", "memory=vanilla", "precision=fp32"),
    *("device=cpu", "cases=0", "dataset.workers=0", "run_dir=run"),
)


def test_runs_killed_at_random_instants_end_as_one_that_was_not():
    done = subprocess.run(
        [sys.executable, KILL_TEST, "--kills", "3", "--variants", "slides"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 3
    assert counts["differences"] == counts["left_behind"] == []


@pytest.fixture(scope="module")
def interrupted(slides, tmp_path_factory):
    """A run of 1000 epochs that got SIGTERM in its second one, what a rival and it itself said."""
    folder = tmp_path_factory.mktemp("interrupted")
    words = [
        *SMALL,
        "epochs=1000",
        "max_steps=17",
        "checkpoint_minutes=0",
        f"dataset.manifest={slides}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "umtrain", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/1000: train"):
                break
        # Both are in the same folder now, one of them for good.
        process.send_signal(signal.SIGSTOP)
        rival = subprocess.run(
            [sys.executable, "-m", "umtrain", *words], cwd=folder, capture_output=True, text=True
        )
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return folder, words, process, rival, errors


@pytest.mark.fault("two processes in one run directory", "exit 2, who holds it is named")
def test_a_second_process_in_the_same_run_directory_is_refused(interrupted):
    _, _, process, rival, _ = interrupted
    assert rival.returncode == 2
    assert f"run is in use by process {process.pid} on" in rival.stderr


def test_sigterm_saves_and_says_how_to_go_on(interrupted):
    folder, _, process, _, errors = interrupted
    assert process.returncode == 130
    said = r"umtrain: interrupted by SIGTERM, saved after step (\d); go on with: (.*)"
    step, command = re.fullmatch(said, errors.strip()).groups()
    assert command == "umtrain fit resume=run"
    record = json.loads((folder / "run" / "metrics.json").read_text())
    assert record["status"] == "interrupted"
    assert record["reasons"]["status"] == "interrupted by SIGTERM"
    assert record["train"]["steps"] == int(step)
    assert load_checkpoint(step_paths(folder / "run" / "checkpoints")[0])["step"] == int(step)


def test_another_configuration_is_refused_with_the_difference(interrupted, monkeypatch, capsys):
    folder, words, *_ = interrupted
    monkeypatch.chdir(folder)
    assert main([*words, "seed=5", "optim.clip_norm=1"]) == 2
    assert "optim.clip_norm: null, now 1.0\n  seed: 0, now 5\n" in capsys.readouterr().err


@pytest.mark.fault("a damaged newest checkpoint", "the one before is used, which is said")
def test_the_run_goes_on_by_its_name_alone(interrupted, umtrain):
    folder, *_ = interrupted
    newest = step_paths(folder / "run" / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = umtrain("fit", "resume=run", "dataset.workers=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}: damaged or not a checkpoint" in done.stdout
    assert "resume   after step" in done.stdout
    record = json.loads((folder / "run" / "metrics.json").read_text())
    assert (record["status"], record["train"]["steps"]) == ("ok", 17)
    assert len(record["train"]["resumed_after_steps"]) == 1
    lines = (folder / "run" / "steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, 18))]


def test_a_sweep_goes_on_with_its_unfinished_jobs_and_not_with_others(slides, tmp_path):
    (job,) = plan_jobs({"res": ["64"]}, [f"dataset.manifest={slides}"], tmp_path)
    assert not is_unfinished(job)
    job.run_dir.mkdir()
    write_config(job.run_dir, job.config)
    assert is_unfinished(job)
    write_config(job.run_dir, load_config(["res=64", "seed=3", f"dataset.manifest={slides}"]))
    assert not is_unfinished(job)
