import ctypes
import math
import time
from pathlib import Path

from umtrain.data.isolated import ChildFailedError, map_isolated


def test_answers_come_in_order_from_any_number_of_processes():
    numbers = [float(n) for n in range(20)]
    for workers in (1, 3):
        roots = map_isolated(math.sqrt, numbers, workers=workers, timeout_s=60)
        assert list(roots) == [math.sqrt(n) for n in numbers]


def test_a_crash_is_the_answer_of_one_call_alone():
    # Reading from address 0 ends the process that does it.
    answers = list(map_isolated(ctypes.string_at, [b"a", 0, b"b"], workers=1, timeout_s=60))
    assert answers[::2] == [b"a", b"b"]
    assert isinstance(answers[1], ChildFailedError)
    assert str(answers[1]) == "the process crashed (SIGSEGV)"


def test_a_call_that_hangs_is_ended():
    answers = list(map_isolated(time.sleep, [0, 3600, 0], workers=1, timeout_s=2))
    assert answers[::2] == [None, None]
    assert str(answers[1]) == "no answer within 2 s"


def test_an_exception_is_named():
    (answer,) = map_isolated(math.sqrt, [-1.0], workers=1, timeout_s=60)
    assert isinstance(answer, ChildFailedError)
    assert str(answer).startswith("ValueError: ")


def test_processes_end_with_the_iteration():
    answers = map_isolated(time.sleep, [0, 3600], workers=2, timeout_s=3600)
    next(answers)
    answers.close()
    children = Path("/proc/self/task").glob("*/children")
    running = [pid for file in children for pid in file.read_text().split()]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running]
    assert not any(b"spawn_main" in command for command in commands)


def test_nothing_to_do_starts_nothing():
    assert list(map_isolated(math.sqrt, [], workers=2, timeout_s=1)) == []
