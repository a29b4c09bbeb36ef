"""Copies out and in, played through: what moves, what stays, who waits."""

import dataclasses

import pytest

from umtrain.planning.step import Allocation, Operation, Save, StepTrace
from umtrain.planning.swapping import Launching, Link, swapped
from umtrain.planning.usage import Usage, kept

N_MAPS = 8
MIB = 2**20


@pytest.fixture
def chain() -> StepTrace:
    """A step of maps of 1 MiB: each is made by its layer, read by the next, and back in reverse."""
    names = [f"layer{i}" for i in range(N_MAPS)]
    operations = [Operation("convolution", n, "forward", "fp32", 0.0, MIB, MIB) for n in names]
    operations += [
        Operation("convolution_backward", n, "backward", "fp32", 0.0, MIB, MIB)
        for n in reversed(names)
    ]
    allocations = []
    for i, name in enumerate(names):
        reader, read_back = min(i + 1, N_MAPS - 1), 2 * N_MAPS - 1 - i
        touched = tuple(dict.fromkeys((i, reader, read_back)))
        saves = (Save(reader, "Conv2d"),)
        allocations.append(Allocation(MIB, "saved", i, read_back, name, touched, saves, reader))
    return StepTrace(operations, allocations)


def run(trace: StepTrace, bytes_per_s: float, window_bytes: int = 2 * MIB, **options) -> Usage:
    link = Link(bytes_per_s, bytes_per_s)
    seconds = [1.0] * len(trace.operations)
    return swapped(trace, seconds, link, lambda a: a.saves[0].at, window_bytes, **options)


def live_bytes(usage: Usage) -> int:
    """Return the most bytes that are on the device at once."""
    n_operations = len(usage.trace.operations)
    return max(
        sum(s.n_bytes for s in usage.stays if s.first <= i <= s.last) for i in range(n_operations)
    )


def test_a_fast_link_costs_no_time_and_frees_most_of_the_device(chain):
    usage = run(chain, bytes_per_s=100 * MIB)
    assert usage.stall_s < 0.1
    # What is read and made, what leaves, and the window ahead.
    assert live_bytes(usage) <= 5 * MIB < live_bytes(kept(chain))


def test_all_goes_out_and_what_had_left_comes_back(chain):
    usage = run(chain, bytes_per_s=100 * MIB)
    assert usage.out_bytes == usage.host_peak_bytes == N_MAPS * MIB
    assert N_MAPS * MIB - 2 * MIB <= usage.in_bytes <= N_MAPS * MIB


def test_a_slow_link_makes_compute_wait_for_each_byte_beyond_the_window(chain):
    fast, slow = run(chain, bytes_per_s=2 * MIB), run(chain, bytes_per_s=MIB / 4)
    assert fast.stall_s < slow.stall_s
    # Each way takes 4 s a map, and a step computes for 16 s.
    assert 2 * 4 * (N_MAPS - 3) - 2 * N_MAPS <= slow.stall_s <= 2 * 4 * N_MAPS


def test_waiting_at_the_end_of_each_layer_holds_less_and_takes_longer(chain):
    slow = MIB / 2
    free_running = run(chain, slow, window_bytes=8 * MIB)
    waiting = run(chain, slow, window_bytes=8 * MIB, ends_with_layer=lambda position: True)
    forward_end = chain.n_forward - 1
    held = [
        sum(s.n_bytes for s in usage.stays if s.first <= forward_end <= s.last)
        for usage in (free_running, waiting)
    ]
    assert held[1] < held[0]


def test_what_is_not_chosen_stays(chain):
    usage = swapped(chain, [1.0] * len(chain.operations), Link(MIB, MIB), lambda a: None, MIB)
    assert (usage.out_bytes, usage.stall_s) == (0, 0.0)
    assert sorted(map(dataclasses.astuple, usage.stays)) == sorted(
        map(dataclasses.astuple, kept(chain).stays)
    )


def test_a_host_that_runs_ahead_keeps_what_it_did_not_see_leave(chain):
    ahead = Launching(operation_s=1e-3, transfer_s=1e-3)
    usage = run(chain, bytes_per_s=100 * MIB, launching=ahead)
    end = len(chain.operations) - 1
    held = sum(stay.n_bytes for stay in usage.stays if stay.last == end)
    in_step = run(chain, bytes_per_s=100 * MIB)
    held_in_step = sum(stay.n_bytes for stay in in_step.stays if stay.last == end)
    assert held == held_in_step + 2 * MIB  # the window
    assert usage.extra_s == pytest.approx(1e-3)  # of the first launch


def test_a_gpu_waits_for_a_host_that_is_busy_with_transfers(chain):
    quick, slow = Launching(1.0, 0.0), Launching(1.0, 0.5)
    first_s = run(chain, bytes_per_s=1000 * MIB, launching=quick).extra_s
    usage = run(chain, bytes_per_s=1000 * MIB, launching=slow)
    n_transfers = (usage.out_bytes + usage.in_bytes) / MIB
    assert first_s == pytest.approx(1.0, abs=0.1)
    assert usage.extra_s - first_s == pytest.approx(0.5 * n_transfers, abs=0.1)
