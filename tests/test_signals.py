import os
import signal

import pytest

from umtrain.errors import Interrupted, RunError
from umtrain.signals import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def send(number):
    os.kill(os.getpid(), number)


def interrupted(work, grace_s=60.0):
    """Run `work(stop, done)` until it is interrupted; return what it had done, and the signal."""
    done = []
    with StopRequest(grace_s) as stop, pytest.raises(Interrupted) as raised:
        work(stop, done)
    assert str(raised.value) == f"interrupted by {stop.name}"
    return done, stop.name


@pytest.mark.parametrize("number", SIGNALS)
def test_work_between_two_states_ends_first(number):
    def work(stop, done):
        with stop.finishing():
            send(number)
            done.append("step")
        done.append("next step")

    assert interrupted(work) == (["step"], number.name)


@pytest.mark.parametrize("number", SIGNALS)
def test_other_work_ends_at_once(number):
    def work(stop, done):
        send(number)
        done.append("more")

    assert interrupted(work) == ([], number.name)


def test_work_that_takes_longer_than_the_grace_is_left():
    def work(stop, done):
        with stop.finishing():
            send(signal.SIGTERM)
            while True:
                pass

    assert interrupted(work, grace_s=0) == ([], "SIGTERM")


def test_a_second_signal_ends_it_at_once():
    def work(stop, done):
        with stop.finishing():
            send(signal.SIGINT)
            done.append("goes on")
            send(signal.SIGINT)
            done.append("more")

    assert interrupted(work) == (["goes on"], "SIGINT")


def test_work_inside_other_work_ends_with_that():
    def work(stop, done):
        with stop.finishing():
            with stop.finishing():
                send(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("more")

    assert interrupted(work) == (["inner", "outer"], "SIGTERM")


def test_the_grace_goes_on_after_work_inside_other_work():
    def work(stop, done):
        with stop.finishing():
            with stop.finishing():
                send(signal.SIGTERM)
            while True:
                pass

    assert interrupted(work, grace_s=0.01) == ([], "SIGTERM")


def test_a_disk_that_is_full_is_said_whatever_signal_came():
    def work(stop):
        with stop.finishing():
            send(signal.SIGTERM)
            raise RunError("the disk is full")

    with StopRequest(60) as stop, pytest.raises(RunError, match="full"):
        work(stop)


def test_what_fails_because_a_signal_took_its_helpers_is_an_interruption():
    def work(stop, done):
        with stop.finishing():
            send(signal.SIGTERM)
            raise RuntimeError("a reader was killed")

    assert interrupted(work) == ([], "SIGTERM")


def test_a_defect_stays_one():
    with StopRequest(60) as stop, pytest.raises(RuntimeError), stop.finishing():
        raise RuntimeError("a defect")


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(grace_s=60):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
