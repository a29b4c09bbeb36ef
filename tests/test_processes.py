import subprocess
import sys

import psutil

PARENT = """
import subprocess, sys
from umtrain.processes import end_with_parent

child = subprocess.Popen(
    [sys.executable, "-c", "import signal; signal.pause()"],
    preexec_fn=end_with_parent,
)
print(child.pid, flush=True)
child.wait()
"""


def test_a_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()
