"""Whether a run begins, goes on from a checkpoint, or is over: decided before any work.

# Note: [What may change between sessions]
A run that goes on ends as one that was never interrupted, so what its numbers depend on must be as
it was; else the run is refused, with the difference. Free are: where things lie, what is shown,
how often is saved, how images are read, and how memory is had, since every strategy gives the
same gradients (`stream` adds up in another order: the last bits may differ, which is said).
`memory=auto` goes on with what it had chosen. More epochs are free where the learning rate does not
depend on their number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umtrain.checkpoint import FOLDER, load_checkpoint, newest_checkpoint
from umtrain.config import RunConfig, config_to_dict
from umtrain.errors import ConfigError, RunError
from umtrain.files import remove_leftovers
from umtrain.report.record import RECORD_NAME, read_record
from umtrain.run_dir import CONFIG, checkpoint_of, read_run_config

_FREE = {
    *("run_dir", "resume", "cases", "trace", "logger", "on_nan"),
    *("checkpoint_minutes", "signal_grace_s"),
    *("dataset.manifest", "dataset.root", "dataset.workers"),
    *("dataset.read_timeout_s", "dataset.max_bad_fraction"),
}
_FREE_GROUP = "memory."


@dataclass(frozen=True)
class Start:
    """How a session begins.

    `checkpoint` is what it goes on from, after `step`, None for a run from its first step;
    `strategy` the memory strategy that ran before. `is_over`: there is nothing left to do.
    """

    checkpoint: Path | None = None
    strategy: str | None = None
    is_over: bool = False
    step: int = 0


def plan_start(
    run_dir: Path, config: RunConfig, manifest_sha256: str, say: Callable[[str], None]
) -> Start:
    """Return how the run in `run_dir`, which this process has locked, begins or goes on.

    Raises ConfigError if `config` or the manifest is not what the run was made with, and RunError
    if no checkpoint of it is whole.
    """
    if not (run_dir / CONFIG).exists():
        return Start()
    remove_leftovers(run_dir)
    chosen = checkpoint_of(config)
    found = _chosen(chosen) if chosen else newest_checkpoint(run_dir / FOLDER, say)
    if found is None:
        _refuse_difference(run_dir, config_to_dict(read_run_config(run_dir, {})), config)
        return Start(is_over=_is_over(run_dir, say))
    path, state = found
    _refuse_difference(path, state["config"], config)
    if state["manifest_sha256"] != manifest_sha256:
        raise ConfigError(
            f"{config.dataset.manifest} is not the manifest that {run_dir} is trained with (its "
            "content differs); go on with the same rows, or name a new run_dir"
        )
    may_be_over = not chosen and config.epochs == state["config"]["epochs"]
    is_over = may_be_over and _is_over(run_dir, say)
    if not is_over:
        _tell(state, config, say)
    return Start(path, state["strategy"], is_over, state["step"])


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return "key: before, now …" for each key that differs and may change what a run gives."""
    was, is_now = _flat(before), _flat(now)
    free = {*_FREE, "epochs"} if _may_train_longer(before, now) else _FREE
    return [
        f"{key}: {_shown(was, key)}, now {_shown(is_now, key)}"
        for key in sorted(was.keys() | is_now.keys())
        if key not in free and not key.startswith(_FREE_GROUP) and was.get(key) != is_now.get(key)
    ]


def _may_train_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    optim = now["optim"]
    is_free = optim["schedule"] == "plateau" or (
        optim["schedule"] == "constant" and optim["warmup_fraction"] == 0
    )
    # A run cut short by max_steps has validated within an epoch: a longer one would not have.
    return bool(is_free and now["epochs"] > before["epochs"] and before["max_steps"] is None)


def _refuse_difference(where: Path, before: dict[str, Any], config: RunConfig) -> None:
    lines = differences(before, config_to_dict(config))
    if lines:
        raise ConfigError(
            f"{where} belongs to a run of another configuration:\n  "
            + "\n  ".join(lines)
            + "\nGive the values it had, to go on with it, or name a new run_dir"
        )


def _chosen(path: Path) -> tuple[Path, dict[str, Any]]:
    state = load_checkpoint(path)
    if "config" not in state:
        raise RunError(f"{path}: weights alone; training goes on from one of the step-*.pt")
    return path, state


def _is_over(run_dir: Path, say: Callable[[str], None]) -> bool:
    path = run_dir / RECORD_NAME
    if not path.exists():
        return False
    try:
        return bool(read_record(run_dir)["status"] == "ok")
    except RunError:
        say(f"record   {path} is damaged; it is written anew")
        return False


def _tell(state: dict[str, Any], config: RunConfig, say: Callable[[str], None]) -> None:
    say(f"resume   after step {state['step']}")
    before, now = state["strategy"], config.memory.name
    if now not in (before, "auto"):
        note = "; the last bits may differ" if "stream" in (before, now) else ""
        say(f"memory   {now}; {before} before{note}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    return "null" if values[key] is None else str(values[key])
