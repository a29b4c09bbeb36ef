import os
import socket
import subprocess
import sys

import pytest

from umtrain.errors import RunError
from umtrain.lock import run_lock

HOLD = """
import sys
from pathlib import Path
from umtrain.lock import run_lock

with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    text = f"in use by process {holder.pid} on {socket.gethostname()}; wait for it"
    with pytest.raises(RunError, match=text), run_lock(tmp_path):
        pass
    holder.communicate("")
    with run_lock(tmp_path):
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_blocks_nobody(holder, tmp_path):
    holder.kill()
    holder.communicate()
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    with run_lock(tmp_path):
        pass


def test_the_same_process_is_refused_too(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(RunError, match=f"process {os.getpid()} on"),
        run_lock(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


LOCK = """
import sys
from pathlib import Path
from umtrain.lock import run_lock

with run_lock(Path(sys.argv[1])):
    pass
"""


def test_a_read_only_run_directory_is_named(tmp_path, in_own_mounts):
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    done = in_own_mounts(mount, sys.executable, "-c", LOCK, tmp_path)
    assert f"RunError: {tmp_path}: cannot be written (Read-only file system)" in done.stderr
