import io
import logging

import pytest
from rich.console import Console as RichConsole

from umtrain import console as module
from umtrain.console import Console, format_duration


@pytest.fixture
def plain():
    return Console(RichConsole(file=io.StringIO(), width=80))


def test_off_a_terminal_progress_is_plain_lines_with_the_time_left(plain, monkeypatch):
    now_s = iter(range(0, 1000, 3))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now_s)))
    with plain.task("epoch 1/2", 4) as bar:
        for done in range(1, 5):
            bar.update(done, f"loss {done}")
    lines = plain.rich.file.getvalue().splitlines()
    assert lines == ["epoch 1/2: 2/4, 6.0 s left  loss 2", "epoch 1/2: 4/4, 0.0 s left  loss 4"]


def test_what_is_said_is_in_the_log_too(plain, tmp_path):
    plain.open_log(tmp_path / "log.txt")
    plain.say("three [of] four")
    plain.close_log()
    plain.say("not this")
    assert (tmp_path / "log.txt").read_text().endswith(" three [of] four\n")
    assert "three [of] four\nnot this\n" in plain.rich.file.getvalue()


def test_what_modules_log_is_said(plain):
    logger = logging.getLogger("umtrain")
    before = (logger.handlers, logger.level, logger.propagate)
    try:
        plain.relay_logging()
        logging.getLogger("umtrain.models").info("12 tensors loaded")
    finally:
        logger.handlers, logger.level, logger.propagate = before
    assert plain.rich.file.getvalue() == "12 tensors loaded\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.26, "8.3 s"), (245, "4 min 05 s"), (7800, "2 h 10 min"), (59.99, "60.0 s")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text
