"""Size and SHA-256 of an image's content: one file, or a folder of slices."""

import hashlib
from pathlib import Path

from umtrain.data.ct_series import slice_files

_CHUNK_BYTES = 2**20


def content_files(path: Path) -> list[Path]:
    """Return the files that an image consists of, sorted by name."""
    return slice_files(path) if path.is_dir() else [path]


def content_bytes(path: Path) -> int:
    """Return the size of an image's files together."""
    return sum(file.stat().st_size for file in content_files(path))


def content_sha256(path: Path) -> str:
    """Return the digest of an image's files one after another, as `cat FILES | sha256sum`."""
    digest = hashlib.sha256()
    for file in content_files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
