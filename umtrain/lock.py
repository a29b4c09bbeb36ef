"""One process at a time in a run directory."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from umtrain.errors import RunError

_NAME = ".lock"


@contextmanager
def run_lock(run_dir: Path) -> Generator[None]:
    """Hold the run directory until the block ends.

    The kernel holds the lock (flock): it is gone with the process, however that ends.
    Raises RunError if another process has it, naming that, or if the folder cannot be written.
    """
    descriptor = _take(run_dir)
    try:
        yield
    finally:
        _release(run_dir, descriptor)


def move_run(run_dir: Path, target: Path) -> None:
    """Rename a run directory that no process is at work in. Raises RunError."""
    descriptor, lies_at = _take(run_dir), run_dir
    try:
        lies_at = run_dir.rename(target)
    except OSError as error:
        raise RunError(
            f"{run_dir}: cannot be renamed to {target.name} ({error.strerror}); make the folder "
            "around it writable, or name another one"
        ) from error
    finally:
        _release(lies_at, descriptor)


def _take(run_dir: Path) -> int:
    path = run_dir / _NAME
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(
                f"{run_dir}: cannot be written ({error.strerror}); make it writable, or name "
                "another folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunError(
                f"{run_dir} is in use by {holder or 'another process'}; wait for it to end, or "
                "name another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise RunError(f"{path}: cannot be locked ({error.strerror})") from error
        if _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)


def _release(run_dir: Path, descriptor: int) -> None:
    # While it is held: who opened it meanwhile sees that it is no longer there.
    (run_dir / _NAME).unlink(missing_ok=True)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether the open file is still the one at `path`, not one removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
