"""Checkpoints: whole, checksummed files of tensors and plain values, loaded without running code.

`step-00000012.pt` is all that training needs to go on after step 12; `best.pt` is the weights of
the best epoch alone, for evaluation.
"""

import errno
import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from umtrain.errors import OutOfMemoryError, RunError
from umtrain.files import write_atomic

FOLDER = "checkpoints"
BEST = "best.pt"

_DIGEST = "sha256"
_DAMAGED = ".damaged"
_N_KEPT = 2


class DamagedError(RunError):
    """A checkpoint holds something else than what was written."""


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` in a run's folder of checkpoints."""
    return folder / f"step-{step:08d}.pt"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint was written after, by its name."""
    return int(path.stem.removeprefix("step-"))


def step_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder` that training can go on from, newest first."""
    return sorted(folder.glob("step-????????.pt"), reverse=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically, with its checksum.

    Raises RunError if the disk does not take it; what was at `path` before stays.
    """
    import torch

    plain = _plain(state)
    handled = sys.exc_info()[1]
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda stream: torch.save({**plain, _DIGEST: _digest(plain)}, stream))
    except (OSError, RuntimeError) as error:
        # torch reports a stream that fails, or a signal meanwhile, as its own error, with that
        # behind it; further behind is what was being handled before.
        cause = _behind(error, handled)
        if not isinstance(cause, OSError):
            raise cause from None
        is_full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RunError(
            f"{path}: the checkpoint could not be written ({cause.strerror}); earlier ones are "
            f"whole. {'Free some of that disk' if is_full else 'Make that folder writable'}, then "
            "start the run again: it goes on from the last one"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what save_checkpoint wrote, on the CPU.

    Raises DamagedError if it holds anything but tensors and values, or not those that were
    written; RunError if the disk does not give it; OutOfMemoryError.
    """
    import torch

    handled = sys.exc_info()[1]
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        written = state.pop(_DIGEST)
    except FileNotFoundError:
        raise RunError(
            f"{path}: no such checkpoint; the first is written as an epoch ends"
        ) from None
    except Exception as error:
        raise _unread(path, _behind(error, handled)) from error
    if written != _digest(state):
        raise DamagedError(_damaged(path, "its checksum is that of another content"))
    return state


def newest_checkpoint(
    folder: Path, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole, and its state; None if there never was one.

    Damaged ones are renamed, and `say` is told. Raises RunError if there are only such, or if the
    newest cannot be read: it may be whole.
    """
    paths = step_paths(folder)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except DamagedError as error:
            say(str(error))
            path.replace(path.with_suffix(_DAMAGED))
    if paths or any(folder.glob(f"step-*{_DAMAGED}")):
        raise RunError(
            f"{folder}: every checkpoint is damaged; restore one from a copy, or start over in a "
            "new run_dir"
        )
    return None


def prune(folder: Path, best_steps: Iterable[int]) -> None:
    """Remove all but the last checkpoints, and what was the best when each was written."""
    paths = step_paths(folder)
    kept = {step_of(path) for path in paths[:_N_KEPT]}
    bests = {max((best for best in best_steps if best <= step), default=step) for step in kept}
    for path in paths:
        if step_of(path) not in kept | bests:
            path.unlink()
    for path in folder.glob(f"step-*{_DAMAGED}"):
        path.unlink()


def _damaged(path: Path, why: str) -> str:
    return (
        f"{path}: damaged or not a checkpoint of umtrain ({why}); train again, or restore the file"
    )


def _plain(value: Any) -> Any:
    """Return `value` with Python's numbers for NumPy's, which weights_only does not load."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _digest(state: Any) -> str:
    """Return the SHA-256 of all that `state` holds, whatever file it lies in.

    torch's own zip files have checksums, but torch does not look at them.
    """
    digest = hashlib.sha256()
    _add(state, digest.update)
    return digest.hexdigest()


def _add(value: Any, update: Callable[[Any], None]) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, item in value.items():
            update(f"{key!r}:".encode())
            _add(item, update)
    elif isinstance(value, list | tuple):
        update(f"[{len(value)}".encode())
        for item in value:
            _add(item, update)
    else:
        update(repr(value).encode())


def _unread(path: Path, error: BaseException) -> Exception:
    """Return what to raise where reading the checkpoint at `path` ended in `error`."""
    from umtrain.memory.budget import is_out_of_memory

    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"{path}: memory ran out as this checkpoint was read ({error}); it is kept: free "
            "memory, or raise the limit, then start the run again"
        )
    if isinstance(error, OSError):
        return RunError(
            f"{path}: cannot be read ({error.strerror}); it is kept: make it readable, then start "
            "the run again"
        )
    return DamagedError(_damaged(path, "cannot be read"))


def _behind(error: Exception, handled: BaseException | None) -> BaseException:
    """Return the OSError or KeyboardInterrupt that led to `error`; else `error` itself.

    `handled` is an error that was there before, and has no part in it.
    """
    cause: BaseException | None = error
    while cause is not None and cause is not handled:
        if isinstance(cause, OSError | KeyboardInterrupt):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error
