import os
import signal

import pytest

from umtrain.errors import Interrupted
from umtrain.signals import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_work_between_two_states_ends_first(number):
    done = []
    with StopRequest(grace_s=60) as stop, pytest.raises(Interrupted, match=number.name):
        with stop.finishing():
            send(number)
            done.append("step")
        done.append("next step")
    assert done == ["step"]
    assert stop.name == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_other_work_ends_at_once(number):
    done = []
    with StopRequest(grace_s=60), pytest.raises(Interrupted, match=number.name):
        send(number)
        done.append("more")
    assert done == []


def test_work_that_takes_longer_than_the_grace_is_left():
    with StopRequest(grace_s=0) as stop, pytest.raises(Interrupted), stop.finishing():
        send(signal.SIGTERM)
        while True:
            pass


def test_a_second_signal_ends_it_at_once():
    done = []
    with StopRequest(grace_s=60) as stop, pytest.raises(Interrupted), stop.finishing():
        send(signal.SIGINT)
        done.append("goes on")
        send(signal.SIGINT)
        done.append("more")
    assert done == ["goes on"]


def test_what_fails_because_a_signal_took_its_helpers_is_an_interruption():
    with StopRequest(grace_s=60) as stop, pytest.raises(Interrupted), stop.finishing():
        send(signal.SIGTERM)
        raise RuntimeError("a reader was killed")
    with StopRequest(grace_s=60) as stop, pytest.raises(RuntimeError), stop.finishing():
        raise RuntimeError("a defect")


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(grace_s=60):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0
