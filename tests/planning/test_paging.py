"""Pages under a budget: least recently used go, and more room never means more traffic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.planning.paging import Grouped, Pager, PageTable
from umtrain.planning.profile import load_profile
from umtrain.planning.step import Allocation, Operation, Save, StepTrace

TOUCHES = st.lists(st.integers(0, 9), min_size=1, max_size=60)


def missed_bytes(touches: list[int], sizes: list[int], room_bytes: int) -> int:
    table = PageTable()
    return sum(table.touch(block, sizes[block], room_bytes)[0] for block in touches)


@given(TOUCHES, st.lists(st.integers(1, 50), min_size=10, max_size=10))
def test_with_room_for_all_each_page_comes_once(touches, sizes):
    assert missed_bytes(touches, sizes, sum(sizes)) == sum(sizes[b] for b in set(touches))


@given(TOUCHES, st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_more_room_never_misses_more(touches, size, room_bytes, more_bytes):
    sizes = [size] * 10
    more = missed_bytes(touches, sizes, (room_bytes // size + more_bytes) * size)
    assert more <= missed_bytes(touches, sizes, room_bytes // size * size)


@given(TOUCHES, st.integers(0, 100))
def test_what_is_in_never_passes_the_room(touches, room_bytes):
    table = PageTable()
    for block in touches:
        table.touch(block, 10 + block, room_bytes)
        assert table.resident_bytes <= room_bytes


def test_the_block_touched_longest_ago_goes_first():
    table = PageTable()
    for block in (0, 1, 0):
        table.touch(block, 10, 20)
    assert table.touch(2, 10, 20) == (10, {1: 10})


N_MAPS = 8
MIB = 2**20


def chain() -> StepTrace:
    """Return a step of N_MAPS maps of 1 MiB, each saved by its own layer, read back in reverse."""
    operations = [
        Operation("convolution", f"layer{i}", "forward", "fp32", 0.0, MIB, MIB)
        for i in range(N_MAPS)
    ] + [
        Operation("convolution_backward", f"layer{i}", "backward", "fp32", 0.0, MIB, MIB)
        for i in reversed(range(N_MAPS))
    ]
    allocations = []
    for i in range(N_MAPS):
        read = 2 * N_MAPS - 1 - i
        saves = (Save(min(i + 1, N_MAPS - 1), ""),)
        allocations.append(Allocation(MIB, "saved", i, read, f"layer{i}", (i, read), saves, i))
    return StepTrace(operations, allocations)


def run(room_bytes: int, groups: Grouped | None = None, operation_s: float = 1.0):
    trace = chain()
    n_operations = len(trace.operations)
    rooms = [room_bytes] * n_operations
    profile = load_profile("v100_32gb")
    pager = Pager(trace, trace.allocations, rooms, profile, groups)
    return pager.run([operation_s] * n_operations)


GROUPS = [i // 2 for i in range(N_MAPS)]
OF_OPERATION = [*GROUPS, *reversed(GROUPS)]


def test_where_all_fits_nothing_moves():
    moved = run(N_MAPS * MIB)
    assert (moved.out_bytes, moved.in_bytes, moved.stall_s) == (0, 0, 0.0)


def test_what_goes_out_comes_back():
    moved = run(N_MAPS // 2 * MIB)
    assert moved.in_bytes == moved.out_bytes > 0
    assert moved.stall_s > 0


@pytest.mark.parametrize("n_maps_of_room", [3, 5])
def test_groups_wait_less_than_demand_and_prefetching_least(n_maps_of_room):
    room_bytes = n_maps_of_room * MIB
    on_demand = run(room_bytes)
    grouped = run(room_bytes, Grouped(OF_OPERATION))
    ahead = run(room_bytes, Grouped(OF_OPERATION, n_ahead=1))
    assert ahead.stall_s < grouped.stall_s < on_demand.stall_s
    assert ahead.in_bytes == ahead.out_bytes
