"""Jobs that submitit runs: on its own local and debug executors, which are real processes."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from umtrain.errors import ConfigError
from umtrain.submission import FitJob, LauncherConfig, Submitter, command_of_ranks, split_launcher

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
    command = command_of_ranks("python", 8, ["fit", "res=64"])
    assert command[:5] == [
        "python",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
    ]
    assert command[5:] == ["8", "-m", "umtrain", "fit", "res=64"]
    assert command_of_ranks("python", 1, ["fit"]) == ["python", "-m", "umtrain", "fit"]
