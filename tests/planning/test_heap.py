"""The simulated heap: what it may and may not do with any sequence of buffers."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from umtrain.planning.heap import ALIGNMENT_BYTES, Event, Heap

SIZES = st.lists(st.integers(1, 2**20), min_size=1, max_size=40)


def replay(events: list[Event], mapped_from_bytes: int = 2**40) -> Heap:
    heap = Heap(mapped_from_bytes)
    for event in events:
        heap.apply(event)
    return heap


@given(SIZES, st.data())
def test_buffers_that_are_alive_never_overlap(sizes, data):
    heap, alive = Heap(2**40), []
    for buffer, n_bytes in enumerate(sizes):
        heap.apply(Event(buffer, n_bytes))
        alive.append(buffer)
        if data.draw(st.booleans()):
            heap.apply(Event(alive.pop(data.draw(st.integers(0, len(alive) - 1)))))
        places = sorted(heap.places.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


@given(SIZES)
def test_the_peak_holds_all_that_is_alive(sizes):
    heap = replay([Event(i, n) for i, n in enumerate(sizes)])
    assert sum(sizes) <= heap.peak_bytes <= sum(sizes) + 2 * ALIGNMENT_BYTES * len(sizes)


def test_a_freed_buffer_is_used_again():
    events = [Event(0, 2**20), Event(0), Event(1, 2**19), Event(2, 2**18)]
    assert replay(events).peak_bytes < 2**20 + 2 * ALIGNMENT_BYTES


def test_the_smallest_hole_that_fits_is_taken():
    taken = [Event(0, 4096), Event(1, 64), Event(2, 1024), Event(3, 64)]
    heap = replay([*taken, Event(0), Event(2), Event(4, 512)])
    assert heap.places[4][0] > heap.places[1][0]


def test_large_buffers_are_mappings_that_leave_no_hole():
    heap = replay([Event(0, 2**20), Event(0), Event(1, 2**20)], mapped_from_bytes=2**20)
    assert heap.peak_bytes == 2**20
    assert heap.end_bytes == 0
