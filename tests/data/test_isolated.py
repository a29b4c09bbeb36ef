import ctypes
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from umtrain.data.isolated import ChildFailedError, Children, Limits, map_isolated
from umtrain.data.wsi import slide_info
from umtrain.errors import DataError

LIMITS = Limits(timeout_s=60, memory_bytes=2**30)


def test_answers_come_in_order_from_any_number_of_processes():
    numbers = [float(n) for n in range(20)]
    for workers in (1, 3):
        roots = map_isolated(math.sqrt, numbers, workers=workers, limits=LIMITS)
        assert list(roots) == [math.sqrt(n) for n in numbers]


def test_a_crash_is_the_answer_of_one_call_alone():
    # Reading from address 0 ends the process that does it.
    answers = list(map_isolated(ctypes.string_at, [b"a", 0, b"b"], workers=1, limits=LIMITS))
    assert answers[::2] == [b"a", b"b"]
    assert isinstance(answers[1], ChildFailedError)
    assert str(answers[1]) == "the process crashed (SIGSEGV)"


def test_a_call_that_hangs_is_ended():
    answers = list(map_isolated(time.sleep, [0, 3600, 0], workers=1, limits=Limits(2, 2**30)))
    assert answers[::2] == [None, None]
    assert str(answers[1]) == "no answer within 2 s"


def test_an_exception_is_named_without_the_text_that_may_quote_a_file():
    (answer,) = map_isolated(int, ["DOE^JOHN"], workers=1, limits=LIMITS)
    assert isinstance(answer, ChildFailedError)
    assert str(answer).startswith("ValueError in isolated.py, line ")


def test_an_error_of_ours_comes_through_in_its_own_words(tmp_path):
    (answer,) = map_isolated(slide_info, [tmp_path / "no.svs"], workers=1, limits=LIMITS)
    assert type(answer) is DataError
    assert str(answer).startswith(f"{tmp_path}/no.svs: no such slide file")


def test_more_memory_than_the_bound_is_refused_to_one_call_alone():
    sizes = [2**20, 2**31, 2**20]
    answers = list(map_isolated(bytes, sizes, workers=1, limits=LIMITS))
    assert [len(answer) for answer in answers[::2]] == [2**20, 2**20]
    assert str(answers[1]) == "more than 1.00 GiB of memory is needed"


def test_a_call_whose_process_was_killed_is_made_again():
    children = Children(time.sleep, 1, LIMITS, n_tries=2)
    children.submit(0).result()
    answer = children.submit(1)
    for process in multiprocessing.active_children():
        process.kill()
    assert answer.result() is None
    children.close()


def test_a_call_that_always_crashes_is_given_up():
    children = Children(ctypes.string_at, 1, LIMITS, n_tries=2)
    with pytest.raises(ChildFailedError, match="SIGSEGV"):
        children.submit(0).result()
    assert children.submit(b"a").result() == b"a"
    children.close()


def _commands():
    me = psutil.Process()
    return [" ".join(child.cmdline()) for child in me.children(recursive=True)]


def test_processes_end_with_the_iteration():
    before = len(_commands())
    answers = map_isolated(time.sleep, [0, 3600], workers=2, limits=Limits(3600, 2**30))
    next(answers)
    assert len(_commands()) >= before + 2
    answers.close()
    # The server that they are forked from stays.
    assert len(_commands()) <= before + 2
    assert not multiprocessing.active_children()


def test_nothing_to_do_starts_nothing():
    assert list(map_isolated(math.sqrt, [], workers=2, limits=LIMITS)) == []


def test_a_killed_process_leaves_no_file_of_its_readers(tmp_path):
    code = (
        "import os, signal\n"
        "from umtrain.data.isolated import call_isolated\n"
        "assert call_isolated(abs, -1) == 1\n"
        "assert os.listdir(os.environ['TMPDIR'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    deadline_s = time.monotonic() + 60
    while (left := list(tmp_path.iterdir())) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not left
