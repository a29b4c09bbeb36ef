"""Sweep jobs that a cluster runs: submitted with submitit, followed until the last has ended.

# Note: [Requeued jobs]
# Before a job's time is up, and when it is preempted, SLURM signals it. submitit then asks `FitJob`
# what to run next time, which ends the training (it saves as it ends) and names the same command
# with the same run directory; and puts the job in the queue again under its own number. The signal,
# SIGUSR2, also reaches the training itself, which is started with it ignored.
#
# Note: [Who waits for whom]
# The cluster kills a job `signal_before_s` after it has signalled. By then torchrun has to be done,
# which kills its processes a while after it has asked them to end; and before that they have to
# have saved, once the step under way is done or given up.
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umtrain.config import conf_dir, group_options, typed_group
from umtrain.errors import ConfigError
from umtrain.files import write_json

SUBMITTED = "submitted.json"
_LOGS = "cluster"
_POLL_S = {"slurm": 10.0, "local": 0.2, "debug": 0.2}
_IGNORING_USR2 = ("/bin/sh", "-c", 'trap "" USR2; exec "$@"', "sh")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Every time limit is an ordinary pause: a job is put back as often as it takes.
_MOST_REQUEUES = 1000


@dataclass(frozen=True)
class LauncherConfig:
    """Where a sweep's jobs run, and what each of them asks of a cluster."""

    name: str
    cluster: str = field(default="slurm", metadata={"help": "slurm; local, debug: submitit's own"})
    partition: str | None = field(default=None, metadata={"help": "SLURM partition"})
    account: str | None = field(default=None, metadata={"help": "SLURM account"})
    gpus_per_node: int = field(default=0, metadata={"help": "GPUs of a job"})
    ranks: int = field(default=1, metadata={"help": "processes of a job, by torchrun"})
    cpus_per_task: int = field(default=1, metadata={"help": "cores of a job"})
    mem: str | None = field(default=None, metadata={"help": "host memory of a job, e.g. 480GB"})
    timeout_min: int = field(default=60, metadata={"help": "time after which it is requeued"})
    signal_before_s: int = field(default=90, metadata={"help": "time to save before that"})
    max_running: int = field(default=16, metadata={"help": "jobs that run at once"})

    @property
    def step_grace_s(self) -> int:
        """What a step may take to end; see Note: [Who waits for whom]."""
        return max(1, self.signal_before_s * 2 // 3)

    @property
    def ranks_grace_s(self) -> int:
        """What all processes may take to end; see Note: [Who waits for whom]."""
        return max(1, self.signal_before_s * 9 // 10)


def split_launcher(overrides: Sequence[str]) -> tuple[LauncherConfig, list[str]]:
    """Return the launcher that `launcher=` and `launcher.key=` words choose, and the other words.

    Raises ConfigError for a launcher, a key or a value that is not known.
    """
    chosen, changes, rest = "local", {}, []
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "launcher":
            chosen = value
        elif key.startswith("launcher."):
            changes[key.removeprefix("launcher.")] = value
        else:
            rest.append(text)
    options = group_options("launcher")
    if chosen not in options:
        raise ConfigError(f"launcher={chosen} is not known; choose one of {', '.join(options)}")
    path = conf_dir() / "launcher" / f"{chosen}.yaml"
    config: LauncherConfig = typed_group(LauncherConfig, path, changes, "launcher.")
    _check(config)
    return config, rest


def _check(config: LauncherConfig) -> None:
    if config.cluster not in _POLL_S:
        raise ConfigError(
            f"launcher.cluster={config.cluster} is not known; choose one of {', '.join(_POLL_S)}"
        )
    for key in ("ranks", "cpus_per_task", "timeout_min", "signal_before_s", "max_running"):
        if getattr(config, key) < 1:
            raise ConfigError(f"launcher.{key}={getattr(config, key)}: must be at least 1")
    if config.signal_before_s >= 60 * config.timeout_min:
        raise ConfigError(
            f"launcher.signal_before_s={config.signal_before_s}: must be less than "
            f"launcher.timeout_min={config.timeout_min} min"
        )


def command_of_ranks(python: str, config: LauncherConfig, words: Sequence[str]) -> list[str]:
    """Return what starts `umtrain` with `words` in the launcher's ranks on one machine."""
    if config.ranks == 1:
        return [python, "-m", "umtrain", *words]
    # torchrun's option for it is not known to torch 2.11, which would refuse to start.
    patience = ["env", f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={config.ranks_grace_s}"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks)]
    return [*patience, python, *start, "-m", "umtrain", *words]


class FitJob:
    """Runs a command on the cluster's machine; see Note: [Requeued jobs]."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command, self._folder = list(command), folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Return the command's exit code."""
        self._process = subprocess.Popen([*_IGNORING_USR2, *self._command], cwd=self._folder)
        return self._process.wait()

    def checkpoint(self) -> Any:
        """End the command, and return what to run next time: the same."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            # Not Popen.wait(): this may have interrupted that very call, which holds its lock.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(FitJob(self._command, self._folder))


@dataclass(frozen=True)
class Ended:
    """A job that is over: its key, its exit code (None if its machine lost it), and why if so."""

    key: str
    code: int | None
    reason: str = ""


class Submitter:
    """Submits commands to a cluster, each under a key of the caller's, and waits for them.

    What is submitted is noted in `folder`: after an interruption a job that is still in the queue
    is followed, not submitted a second time.
    Raises ConfigError where the cluster cannot be reached.
    """

    def __init__(self, config: LauncherConfig, folder: Path) -> None:
        self._config, self._path = config, folder / SUBMITTED
        self._logs = folder / _LOGS
        self._executor = self._create_executor()
        self._ids: dict[str, str] = {}
        if self._path.exists():
            self._ids = json.loads(self._path.read_text(encoding="utf-8"))

    def _create_executor(self) -> Any:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "launcher=slurm needs a package that is not installed; pip install 'umtrain[slurm]'"
            ) from error
        config = self._config
        try:
            executor = submitit.AutoExecutor(
                folder=self._logs,
                cluster=config.cluster,
                slurm_max_num_timeout=_MOST_REQUEUES,
                local_max_num_timeout=_MOST_REQUEUES,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"launcher.cluster={config.cluster}: {error}; start the sweep where sbatch and "
                "srun are, or use launcher=local"
            ) from error
        executor.update_parameters(
            name="umtrain",
            timeout_min=config.timeout_min,
            cpus_per_task=config.cpus_per_task,
            gpus_per_node=config.gpus_per_node or None,
            slurm_signal_delay_s=config.signal_before_s,
            slurm_array_parallelism=config.max_running,
            **_given(
                slurm_partition=config.partition, slurm_account=config.account, slurm_mem=config.mem
            ),
        )
        return executor

    def run(
        self, commands: dict[str, list[str]], say: Callable[[str], None] = lambda text: None
    ) -> Iterator[Ended]:
        """Submit `commands`, and yield each job as it ends."""
        from submitit.helpers import as_completed

        jobs: dict[str, Any] = {}
        new: dict[str, list[str]] = {}
        for key, command in commands.items():
            known = self._followed(key)
            if known is None:
                new[key] = command
            else:
                jobs[key] = known
                say(f"{key}: in the queue already as {known.job_id}")
        if new:
            jobs |= self._submit(new)
        for key in new:
            say(f"{key}: submitted as {jobs[key].job_id}")
        keys = {id(job): key for key, job in jobs.items()}
        for job in as_completed(list(jobs.values()), poll_frequency=_POLL_S[self._config.cluster]):
            yield _ended(keys[id(job)], job)

    def is_queued(self, key: str) -> bool:
        """Return whether a job that was submitted earlier waits or runs."""
        return self._followed(key) is not None

    def _submit(self, commands: dict[str, list[str]]) -> dict[str, Any]:
        """Put the jobs in the queue and note their numbers: both or, short of a crash, neither."""
        here = Path.cwd()
        with _signals_held():
            with self._executor.batch():
                jobs = {k: self._executor.submit(FitJob(c, here)) for k, c in commands.items()}
            self._ids |= {key: job.job_id for key, job in jobs.items()}
            write_json(self._path, self._ids)
        return jobs

    def _followed(self, key: str) -> Any:
        """Return the job of an earlier sweep that is not over, or None."""
        if key not in self._ids or self._config.cluster != "slurm":
            return None
        from submitit import SlurmJob

        job: Any = SlurmJob(self._logs, self._ids[key])
        return None if job.done(force_check=True) else job


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let the block end; then hand on the signals that came meanwhile. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in _SIGNALS}
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for number in came:
            signal.raise_signal(number)


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _ended(key: str, job: Any) -> Ended:
    try:
        return Ended(key, job.result())
    except Exception as error:  # whatever the cluster did to it: a row of the table, no end
        lines = str(error).strip().splitlines()
        return Ended(key, None, lines[-1] if lines else job.state)
