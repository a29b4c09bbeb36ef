"""Group execution and prefetch: who goes out when, and who is back before it is read."""

import pytest
import torch
from torch import nn

from umtrain import memory
from umtrain.memory.grouping import Group
from umtrain.memory.um_group_prefetch import saved_bytes_from
from umtrain.memory.working_set import LayerUse

SHAPE = (1, 8, 128, 128)
MAP_BYTES = 8 * 128 * 128 * 4


@pytest.fixture
def chain():
    """Return five blocks in a row; each saves its convolution's input and its tanh's output."""
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(5))
    )


def _run(name, model, **options):
    strategy = memory.create(name, **options)
    x = torch.randn(SHAPE)
    strategy.prepare(model, x)
    for _ in range(2):
        with strategy.step():
            model(x).sum().backward()
    strategy.close()
    last = [span for span in strategy.trace.spans() if span.step == 1]
    return strategy, last


def _names(spans, lane):
    return list(dict.fromkeys(span.name for span in spans if span.lane == lane))


def test_forward_visits_the_groups_and_backward_in_reverse(chain, room):
    room(MAP_BYTES)
    _, spans = _run("um_group", chain)
    assert _names(spans, "forward") == ["0", "1", "2", "3", "4"]
    assert _names(spans, "backward") == ["4", "3", "2", "1", "0"]


def test_um_faults_tensor_by_tensor_and_um_group_group_by_group(chain, room):
    room(MAP_BYTES)
    _, by_tensor = _run("um", chain)
    _, by_group = _run("um_group", chain)
    assert {span.name for span in by_tensor if span.lane == "fault"} == {"on demand"}
    assert _names(by_tensor, "swap-in") == []
    assert set(_names(by_group, "swap-in")) <= {"4", "3", "2", "1", "0"}
    assert len([s for s in by_group if s.lane == "swap-in"]) <= 5


def test_groups_go_out_as_soon_as_forward_has_left_them(chain, room):
    room(3 * MAP_BYTES)
    _, spans = _run("um_group_prefetch", chain)
    entered_s = {span.name: span.start_s for span in spans if span.lane == "forward"}
    for span in spans:
        if span.lane == "swap-out" and span.name in "0123":
            assert span.start_s >= entered_s[str(int(span.name) + 1)]


def test_the_end_of_forward_stays_where_backward_starts(chain, room):
    room(4 * MAP_BYTES)
    _, spans = _run("um_group_prefetch", chain)
    assert "0" in _names(spans, "swap-out")
    assert "4" not in _names(spans, "swap-out")


def test_prefetch_brings_groups_in_ahead_of_backward(chain, room):
    room(5 * MAP_BYTES)
    strategy, spans = _run("um_group_prefetch", chain)
    reached_s = {span.name: span.start_s for span in spans if span.lane == "backward"}
    ahead = [s for s in spans if s.lane == "swap-in" and s.start_s < reached_s[s.name]]
    assert ahead
    stats = strategy.stats()
    assert stats.prefetch_hits + stats.prefetch_late == len(
        [s for s in spans if s.lane == "swap-in"]
    )


def test_without_a_budget_nothing_moves(chain):
    strategy, spans = _run("um_group_prefetch", chain)
    stats = strategy.stats()
    assert (stats.swapped_out_bytes, stats.swapped_in_bytes) == (0, 0)
    assert stats.host_peak_bytes == 0
    assert {span.lane for span in spans} <= {"forward", "backward"}


def test_the_tail_counts_shared_tensors_once():
    layers = [LayerUse("a", "", saved={1: 10}), LayerUse("b", "", saved={1: 10, 2: 5})]
    groups = [Group(layer.name, (layer,)) for layer in layers]
    assert saved_bytes_from(groups) == [15, 15]
