"""Runs command lines in processes forked from this one, which has imported all that they need.

What `python -m umtrain` spends most of a small run on is importing. A line of JSON on standard
input names the words, folder, environment, files for the output and the seconds it may take; the
answer is the exit code, negative for a signal as `subprocess` has it.
"""

import atexit
import json
import os
import signal
import sys
import traceback
from typing import Any

import psutil

LIBRARIES = (
    *("umtrain.runner", "umtrain.sweep", "umtrain.plan_command", "umtrain.limits_command"),
    *("umtrain.report_command", "umtrain.data_commands", "umtrain.doctor"),
)


def main() -> None:
    """Answer until the input ends."""
    for name in LIBRARIES:
        __import__(name)
    assert psutil.Process().num_threads() == 1, "a fork has none of the threads"
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run(request)
        print(wait(child, request["timeout_s"]), flush=True)


def wait(child: int, timeout_s: int) -> int:
    """Return the exit code of `child`, which is killed when the time is over."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(timeout_s)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        signal.alarm(0)


def run(request: dict[str, Any]) -> None:
    """Be `python -m umtrain` from here on."""
    code = 1
    try:
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        streams = (os.devnull, os.O_RDONLY), *((path, os.O_WRONLY) for path in request["out"])
        for number, (path, flags) in enumerate(streams):
            os.dup2(os.open(path, flags), number)
        sys.argv = ["umtrain", *request["words"]]
        from umtrain.cli import main as umtrain

        code = umtrain(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
