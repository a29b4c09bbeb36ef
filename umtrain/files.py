"""Files that are whole or not there: written beside their place, synced, then renamed."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# What `atomic_path` calls a file that is not whole yet.
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield the path of a temporary file; sync it and rename it to `path` when the block ends.

    Readers see the old file or the new one, never a part; an error leaves the old one. The file
    gets the permissions of the user's umask.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill the file at `path`, atomically (see `atomic_path`)."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        write(stream)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_atomic(path, lambda stream: stream.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON that every reader takes (no NaN), atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove what `atomic_path` left in `folder` and below when its process was killed.

    For folders that no other process writes to meanwhile.
    """
    for path in folder.rglob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def cache_folder() -> Path:
    """Return the folder of what can be made again; it need not exist.

    $UMTRAIN_CACHE, or else umtrain in $XDG_CACHE_HOME or ~/.cache.
    """
    if own := os.environ.get("UMTRAIN_CACHE"):
        return Path(own).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "umtrain"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
