import json
import os
import shutil
import subprocess
import sys

import command_server
import pytest
from hypothesis import settings

from umtrain.memory.allocator import recycle_large_buffers

# A slow machine is no failure: no example has a deadline. Examples are the same in every run, so
# that what fails, fails everywhere.
settings.register_profile("umtrain", deadline=None, derandomize=True)
settings.load_profile("umtrain")
# As in training: half of a worker's time would be page faults of fresh buffers.
recycle_large_buffers("cpu")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """The manifest of eight small slides, two of them for validation and two for test."""
    from umtrain.data.synthetic.slides import make_slides

    folder = tmp_path_factory.mktemp("slides") / "data"
    folder.mkdir()
    return make_slides(folder, 8, 256, 0, None, 1)


@pytest.fixture(scope="session")
def radiographs(tmp_path_factory):
    """The manifest of six small radiographs."""
    from umtrain.data.synthetic.radiographs import make_radiographs

    folder = tmp_path_factory.mktemp("radiographs") / "data"
    folder.mkdir()
    return make_radiographs(folder, 6, 512, 0, None, 1)


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """The manifest of eight small CT volumes, half of them DICOM series, half NIfTI."""
    from umtrain.data.synthetic.volumes import make_volumes

    folder = tmp_path_factory.mktemp("volumes") / "data"
    folder.mkdir()
    return make_volumes(folder, 8, 48, 0, None, 1)


@pytest.fixture(scope="session")
def umtrain(tmp_path_factory):
    """Run the command line in a process of its own; return the finished process."""
    server = subprocess.Popen(
        [sys.executable, command_server.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    out = [tmp_path_factory.mktemp("output") / name for name in ("stdout", "stderr")]

    def run(*arguments, cwd, timeout_s=240, env=None):
        words = [str(argument) for argument in arguments]
        for path in out:
            path.write_text("")
        request = {"words": words, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        request |= {"out": [str(path) for path in out], "timeout_s": timeout_s}
        server.stdin.write(f"{json.dumps(request)}\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in out))

    yield run
    server.communicate()


@pytest.fixture(scope="session")
def in_own_mounts():
    """Run a command where a shell line has mounted something for it alone; skip if that is barred.

    Return the finished process.
    """
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    probe = [*alone, "mount -t tmpfs -o size=64k none /mnt"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine gives a process no mounts of its own")

    def run(mount, *command, cwd=None):
        words = [*alone, f'{mount} && exec "$@"', "sh", *map(str, command)]
        return subprocess.run(words, cwd=cwd, capture_output=True, text=True)

    return run
