"""Jobs that submitit runs: on its own local and debug executors, which are real processes."""

import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import submitit

from umtrain.errors import ConfigError
from umtrain.submission import (
    SUBMITTED,
    Ended,
    FitJob,
    LauncherConfig,
    Submitter,
    _ended,
    command_of_ranks,
    split_launcher,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"

LOCAL = LauncherConfig("slurm", cluster="local", timeout_min=5, signal_before_s=10)


def test_launcher_words_are_no_words_of_the_jobs():
    config, rest = split_launcher(
        ["res=64,128", "launcher=slurm", "launcher.partition=gpu", "launcher.ranks=4"]
    )
    assert rest == ["res=64,128"]
    assert (config.partition, config.ranks, config.gpus_per_node) == ("gpu", 4, 8)


def test_jobs_run_here_unless_a_launcher_is_chosen():
    assert split_launcher(["res=64,128"])[0].name == "local"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["launcher=pbs"], "launcher=pbs is not known; choose one of local, slurm"),
        (["launcher=slurm", "launcher.partitoin=gpu"], "Did you mean launcher.partition"),
        (["launcher=slurm", "launcher.ranks=many"], "expected a whole number"),
        (["launcher=slurm", "launcher.ranks=0"], "must be at least 1"),
        (["launcher=slurm", "launcher.cluster=moon"], "choose one of slurm, local, debug"),
        (["launcher=slurm", "launcher.timeout_min=2"], "must be less than launcher.timeout_min=2"),
    ],
)
def test_a_wrong_launcher_word_is_refused(words, text):
    with pytest.raises(ConfigError) as caught:
        split_launcher(words)
    assert text in str(caught.value)


def test_a_machine_without_slurm_says_where_to_start_the_sweep(tmp_path):
    with pytest.raises(ConfigError, match="start the sweep where sbatch and srun are"):
        Submitter(LauncherConfig("slurm", cluster="slurm"), tmp_path)


# submitit's debug executor leaves its log files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_every_job_yields_its_exit_code(cluster, tmp_path):
    config = LauncherConfig("slurm", cluster=cluster, timeout_min=5, signal_before_s=10)
    commands = {str(code): [sys.executable, "-c", f"raise SystemExit({code})"] for code in (0, 3)}
    ended = list(Submitter(config, tmp_path).run(commands))
    assert {job.key: job.code for job in ended} == {"0": 0, "3": 3}


COUNTING = """
import signal, sys, time
from pathlib import Path
starts = Path(sys.argv[1])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if starts.read_text() == "x":
    def end(*_):
        starts.with_name("saved").write_text("")
        raise SystemExit(130)
    signal.signal(signal.SIGTERM, end)
    starts.with_name("ready").write_text("")  # a pipe: this waits for its reader
    while True:
        signal.pause()
"""


def _counts(process):
    return COUNTING in process.cmdline()


def test_a_preempted_job_saves_and_runs_again_with_the_same_command(tmp_path):
    command = [sys.executable, "-c", COUNTING, str(tmp_path / "starts")]
    os.mkfifo(tmp_path / "ready")
    jobs = Submitter(LOCAL, tmp_path).run({"a": command})
    with ThreadPoolExecutor(1) as follower:
        followed = follower.submit(list, jobs)
        (tmp_path / "ready").read_text()
        [sleeper] = [p for p in psutil.Process().children(recursive=True) if _counts(p)]
        sleeper.parent().send_signal(signal.SIGUSR2)
        [ended] = followed.result()
    assert ended.code == 0
    assert (tmp_path / "starts").read_text() == "xx"
    assert (tmp_path / "saved").exists()


def test_a_command_is_not_ended_by_the_signal_of_the_cluster(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2)"
    assert FitJob([sys.executable, "-c", code], tmp_path)() == 0


def test_several_ranks_are_started_by_torchrun():
    eight = LauncherConfig("slurm", ranks=8, signal_before_s=180)
    command = command_of_ranks("python", eight, ["fit", "res=64"])
    assert command[0] == "env"
    assert command[2:5] == ["python", "-m", "torch.distributed.run"]
    assert command[5:8] == ["--standalone", "--nproc-per-node", "8"]
    assert command[8:] == ["-m", "umtrain", "fit", "res=64"]


def test_a_job_of_one_rank_needs_no_torchrun():
    one = LauncherConfig("slurm", ranks=1)
    assert command_of_ranks("python", one, ["fit"]) == ["python", "-m", "umtrain", "fit"]


def test_torchrun_waits_longer_than_its_30_s_and_ends_before_the_cluster_kills():
    config = LauncherConfig("slurm", ranks=8, signal_before_s=180)
    _, word, *_ = command_of_ranks("python", config, ["fit"])
    name, _, patience_s = word.partition("=")
    assert name == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert 30 < config.step_grace_s < int(patience_s) < config.signal_before_s


@pytest.mark.parametrize("script", ["slurm_node.sbatch", "slurm_four_nodes.sbatch"])
def test_the_scripts_leave_time_to_save_and_to_requeue(script):
    text = (SCRIPTS / script).read_text()
    found = [
        re.search(pattern, text)
        for pattern in (r"signal_grace_s=(\d+)", r"SHUTDOWN_TIMEOUT=(\d+)", r"B:TERM@(\d+)")
    ]
    step_s, ranks_s, warning_s = (int(match[1]) for match in found)
    assert 30 < step_s < ranks_s < warning_s


QUICK = [sys.executable, "-c", ""]


def _noted(folder):
    return list(json.loads((folder / SUBMITTED).read_text()))


@pytest.fixture
def once_submitted(monkeypatch):
    """Have something happen when the jobs of a batch are in the queue, and over already."""
    submit = submitit.LocalExecutor._internal_process_submissions

    def set_up(happen):
        def submit_and_more(executor, submissions):
            jobs = submit(executor, submissions)
            for job in jobs:
                job.wait()
            happen()
            return jobs

        monkeypatch.setattr(
            submitit.LocalExecutor, "_internal_process_submissions", submit_and_more
        )

    return set_up


def test_what_is_submitted_is_noted_before_it_is_told(tmp_path, once_submitted):
    def interrupted(text):
        raise KeyboardInterrupt

    once_submitted(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        list(Submitter(LOCAL, tmp_path).run({"a": QUICK}, interrupted))
    assert _noted(tmp_path) == ["a"]


@pytest.fixture
def interrupts_count():
    """Take interrupts as a shell's foreground job does: a background job is born ignoring them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_jobs_are_submitted_waits_until_they_are_noted(
    tmp_path, once_submitted, interrupts_count
):
    before = signal.getsignal(signal.SIGINT)
    once_submitted(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        list(Submitter(LOCAL, tmp_path).run({"a": QUICK, "b": QUICK}))
    assert _noted(tmp_path) == ["a", "b"]
    assert signal.getsignal(signal.SIGINT) is before


class BlankError(Exception):
    def __str__(self):
        return " \n"


class LostJob:
    state = "NODE_FAIL"

    def result(self):
        raise BlankError


def test_a_job_lost_without_a_word_is_told_by_its_state():
    assert _ended("a", LostJob()) == Ended("a", None, "NODE_FAIL")
