"""Code that the machine's own compiler makes when first needed, and that is kept for later."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from umtrain.files import cache_folder


def c_compiler() -> str | None:
    """Return the C compiler of this machine: $CC, cc or gcc."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def cpp_compiler() -> str | None:
    """Return the C++ compiler of this machine: $CXX, c++ or g++."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def compiled(
    compiler: str | None, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str]
) -> Path:
    """Return the library made of the first of `sources`, which may include the others.

    It lies in the cache folder under a name that says what it was made from: sources, flags,
    compiler and processor. Raises OSError or SubprocessError where it cannot be made.
    """
    if compiler is None:
        raise FileNotFoundError("no compiler found")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    words = " ".join((*flags, *libraries))
    made_from = hashlib.sha256(version + words.encode() + _processor())
    for source in sources:
        made_from.update(source.read_bytes())
    name = f"{sources[0].stem}-{made_from.hexdigest()[:16]}.so"
    target = cache_folder() / "native" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as made:
            output = Path(made) / target.name
            command = [compiler, *flags, str(sources[0]), "-o", str(output), *libraries]
            subprocess.run(command, capture_output=True, check=True, text=True)
            output.replace(target)  # several processes may do this at once; each is whole
    return target


def failure_of(error: OSError | subprocess.SubprocessError) -> str:
    """Return one line that says why `compiled`, or the loading of what it made, failed."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1])


def _processor() -> bytes:
    """Return what tells processors apart, as a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return b""
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features"))})).encode()
