"""Schedules and plans: lifetimes never overlap in the arena, budgets hold, choices are sensible."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from umtrain.errors import OutOfMemoryError
from umtrain.streaming.module import program_of
from umtrain.streaming.plan import NoPlanError, Residents, make_plan, place
from umtrain.streaming.program import Program
from umtrain.streaming.schedule import Action, Buffer, Needs, Schedule, groups_of
from umtrain.streaming.tracing import trace


@pytest.fixture(scope="module")
def resnet() -> Program:
    traced = trace(torchvision.models.resnet50())
    part = getattr(traced.parts, traced.streamed[0])
    return program_of(part, [torch.empty(1, 3, 256, 256)])


@pytest.fixture(scope="module")
def needs(resnet) -> Needs:
    return Needs(resnet, [False], training=True)


buffers = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(0, 30), st.integers(0, 10)), max_size=30
).map(lambda rows: [Buffer("map", size, first, first + n) for size, first, n in rows])


@given(buffers)
def test_buffers_that_live_at_once_never_share_a_byte(made):
    offsets, end_bytes = place(made)
    for i, one in enumerate(made):
        assert offsets[i] + one.n_bytes <= end_bytes
        for j in range(i):
            other = made[j]
            if one.first <= other.last and other.first <= one.last:
                apart = offsets[i] + one.n_bytes <= offsets[j]
                assert apart or offsets[j] + other.n_bytes <= offsets[i]


def test_a_pause_is_the_longest_time_without_a_reader_and_ends_one_action_ahead():
    buffer = Buffer("map", 1, 3, 40, True, [3, 4, 6, 30, 31, 40])
    assert buffer.pause == (6, 29)
    assert Buffer("map", 1, 3, 5, True, [3, 5]).pause == (3, 5)
    assert Buffer("map", 1, 3, 5, True, [3, 4, 5]).pause is None
    assert Buffer("gradient", 1, 3, 40, False, [3, 40]).pause is None


N_ACTIONS = 24
touched = st.lists(st.integers(0, N_ACTIONS - 1), min_size=1, max_size=4, unique=True).map(sorted)
schedules = st.lists(st.tuples(st.integers(1, 5), touched, st.booleans()), max_size=12).map(
    lambda rows: Schedule(
        [Action("forward", 0)] * N_ACTIONS,
        [Buffer("map", n, at[0], at[-1], content, at) for n, at, content in rows],
    )
)


def on_the_device(buffer, stay):
    if stay == "out":
        return set()
    held = set(range(buffer.first, buffer.last + 1))
    before, after = buffer.pause if stay == "swapped" else (0, 0)
    return held - set(range(before + 1, after))


def alive(schedule, stays):
    """The bytes on the device during each action, counted one by one."""
    pairs = list(zip(schedule.buffers, stays, strict=True))
    return [sum(b.n_bytes for b, s in pairs if i in on_the_device(b, s)) for i in range(N_ACTIONS)]


def best_choice(schedule, stays, peak):
    """What the rule says is to be put out at the peak, and how; None if nothing is left."""
    choices = []
    for i, (buffer, stay) in enumerate(zip(schedule.buffers, stays, strict=True)):
        if peak not in on_the_device(buffer, stay):
            continue
        pauses = buffer.pause is not None and buffer.pause[0] < peak < buffer.pause[1]
        traffic = 2.0 if pauses else float(len(buffer.touches))
        choices.append((traffic, buffer.first - buffer.last, pauses, i))
    return min(choices, default=None)


@given(schedules, st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_buffers_go_in_the_order_of_the_rule_until_what_is_left_fits(schedule, targets):
    residents, expected = Residents(schedule), ["kept"] * len(schedule.buffers)
    for target in sorted(targets, reverse=True):
        residents.put_out(target)
        while max(live := alive(schedule, expected)) > target:
            *_, pauses, i = best_choice(schedule, expected, live.index(max(live)))
            expected[i] = "swapped" if pauses else "out"
        assert residents.stays == expected


def test_maps_that_pause_are_swapped_before_others_are_read_strip_by_strip(resnet, needs):
    whole = make_plan(resnet, needs, None, host_room_bytes=lambda: 2**50)
    plan = make_plan(resnet, needs, int(0.25 * whole.arena_bytes), host_room_bytes=lambda: 2**50)
    assert "swapped" in plan.stays
    assert plan.moved_bytes <= 3 * plan.host_bytes
    for index, resumption in plan.resumed.items():
        assert plan.schedule.buffers[index].pause[1] == resumption.action


def test_everything_is_kept_where_it_fits(resnet, needs):
    plan = make_plan(resnet, needs, None, host_room_bytes=lambda: 2**50)
    assert plan.n_made_again == 0
    assert plan.host_bytes == 0


def test_a_smaller_budget_is_kept_and_costs_work_or_traffic(resnet, needs):
    whole = make_plan(resnet, needs, None, host_room_bytes=lambda: 2**50)
    for share in (0.7, 0.4, 0.2, 0.05):
        budget_bytes = int(share * whole.arena_bytes)
        plan = make_plan(resnet, needs, budget_bytes, host_room_bytes=lambda: 2**50)
        assert plan.arena_bytes <= budget_bytes
        assert plan.n_made_again > 0 or plan.host_bytes > 0


def test_a_map_is_made_again_alone_where_that_is_enough(resnet, needs):
    whole = make_plan(resnet, needs, None, host_room_bytes=None)
    plan = make_plan(resnet, needs, int(0.98 * whole.arena_bytes), host_room_bytes=None)
    assert 0 < plan.n_made_again < 3  # a block has three maps inside


def test_without_gradients_nothing_is_made_again(resnet):
    forward_only = Needs(resnet, [False], training=False)
    whole = make_plan(resnet, forward_only, None, host_room_bytes=None)
    with pytest.raises(NoPlanError):
        make_plan(resnet, forward_only, whole.arena_bytes // 2, host_room_bytes=None)


def test_without_host_memory_the_least_budget_is_named_and_works(resnet, needs):
    with pytest.raises(NoPlanError, match="at least") as refused:
        make_plan(resnet, needs, 2**20, host_room_bytes=None)
    least = 2**20 + refused.value.missing_bytes
    assert make_plan(resnet, needs, least, host_room_bytes=None).arena_bytes <= least


def test_what_is_put_out_fits_host_memory_or_the_need_is_named(resnet, needs):
    whole = make_plan(resnet, needs, None, host_room_bytes=None)
    budget_bytes = int(0.25 * whole.arena_bytes)
    free = make_plan(resnet, needs, budget_bytes, host_room_bytes=lambda: 2**50)
    room_bytes = int(0.9 * free.host_bytes)
    tight = make_plan(resnet, needs, budget_bytes, host_room_bytes=lambda: room_bytes)
    assert tight.host_bytes <= room_bytes
    assert tight.n_made_again > free.n_made_again
    with pytest.raises(OutOfMemoryError, match=r"host memory would run out.*4\.00 KiB"):
        make_plan(resnet, needs, budget_bytes, host_room_bytes=lambda: 4096)


def test_groups_are_whole_and_in_order(resnet):
    groups = groups_of(resnet)
    assert [i for group in groups for i in group] == list(range(len(resnet.segments)))
    assert len(groups) > 16  # a ResNet-50 has sixteen blocks and a stem


def test_a_gradient_passes_through_a_sum_without_a_copy(resnet, needs):
    plan = make_plan(resnet, needs, None, host_room_bytes=lambda: 2**50)
    gradient = plan.schedule.gradient
    sums = [s for s in resnet.segments if s.operation is None]
    shared = [s for s in sums if len({gradient[i] for i in (s.out, *s.sources)}) == 1]
    assert len(shared) == len(sums)


def test_no_gradient_is_planned_for_what_is_frozen():
    network = torchvision.models.resnet18().requires_grad_(False)
    network.layer4.requires_grad_(True)
    traced = trace(network)
    part = getattr(traced.parts, traced.streamed[0])
    program = program_of(part, [torch.empty(1, 3, 64, 64)])
    needs = Needs(program, [False], training=True)
    names = [program.segments[i].name for i, run in enumerate(needs.backward) if run]
    assert names
    assert all(name.startswith("layer4") or "pool" in name for name in names)


def test_without_gradients_maps_die_at_their_last_reader(resnet):
    forward_only = Needs(resnet, [False], training=False)
    plan = make_plan(resnet, forward_only, None, host_room_bytes=None)
    training = make_plan(resnet, Needs(resnet, [False], True), None, host_room_bytes=None)
    assert plan.arena_bytes < training.arena_bytes / 3


def test_a_norm_after_a_norm_has_a_map_of_its_own():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    traced = trace(network)
    program = program_of(getattr(traced.parts, traced.streamed[0]), [torch.empty(1, 3, 8, 8)])
    assert [norm.map for norm in program.norms] == [1, 2]
