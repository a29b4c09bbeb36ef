"""The files of a trace: what a viewer opens and what a person looks at."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from umtrain import memory
from umtrain.memory.timeline import chrome_trace, draw_timelines, last_step, read_trace
from umtrain.memory.trace import LANES


@pytest.fixture
def traced(tmp_path, room):
    """Return the folder that a run of two steps leaves its trace in."""
    room(64 * 1024)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
    x = torch.randn(1, 8, 128, 128)
    strategy = memory.create("um_group_prefetch", trace=tmp_path / "trace", grouping="equal")
    strategy.prepare(model, x)
    for _ in range(3):
        with strategy.step():
            model(x).sum().backward()
    strategy.close()
    return tmp_path / "trace"


def test_the_trace_is_in_chromes_format(traced):
    trace = json.loads((traced / "trace.json").read_text())
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert names == list(LANES)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in events)
    lanes = {event["cat"] for event in events}
    assert {"forward", "backward", "swap-out", "swap-in"} <= lanes


def test_only_the_last_steps_are_kept(traced):
    trace = json.loads((traced / "trace.json").read_text())
    steps = {event["args"]["step"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert steps == {1, 2}


def test_a_trace_that_was_read_back_is_what_was_written(traced):
    spans = read_trace(traced / "trace.json")
    assert {span.step for span in last_step(spans)} == {2}
    again = chrome_trace(spans)
    written = json.loads((traced / "trace.json").read_text())
    for mine, its in zip(again["traceEvents"], written["traceEvents"], strict=True):
        assert (mine["name"], mine["args"]) == (its["name"], its["args"])
        assert mine.get("ts", 0) == pytest.approx(its.get("ts", 0), abs=0.01)
        assert mine.get("dur", 0) == pytest.approx(its.get("dur", 0), abs=0.01)


def test_several_timelines_share_a_picture(traced, tmp_path):
    step = last_step(read_trace(traced / "trace.json"))
    draw_timelines({"one": step, "two": step, "none": []}, tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.size == (1680, 1440)


def test_the_picture_is_a_picture(traced):
    with Image.open(traced / "timeline.png") as picture:
        assert picture.size == (1680, 480)
        assert len(picture.convert("RGB").getcolors(maxcolors=2**20)) > 5


def test_a_strategy_that_never_ran_leaves_no_trace(tmp_path):
    memory.create("um", trace=tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_moves_nothing_shows_its_backward_too(tmp_path, room):
    room(2**40)
    model, x = nn.Conv2d(8, 8, 3), torch.randn(1, 8, 64, 64)
    strategy = memory.create("um", trace=tmp_path)
    strategy.prepare(model, x)
    with strategy.step():
        model(x).sum().backward()
    strategy.close()
    lanes = {span.lane for span in read_trace(tmp_path / "trace.json")}
    assert lanes == {"forward", "backward"}
