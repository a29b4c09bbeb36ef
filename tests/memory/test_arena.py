"""Offsets of saved tensors: never two in one place, the same from step to step."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from umtrain.memory.arena import Arena

GRANULE_BYTES = 64
SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=30)


@given(SIZES, st.randoms(use_true_random=False))
def test_ranges_in_use_never_overlap(sizes, random):
    arena = Arena(GRANULE_BYTES)
    used = {}
    for size in sizes * 3:
        if used and random.random() < 0.4:
            offset = random.choice(sorted(used))
            arena.free(offset)
            del used[offset]
        offset = arena.take(size)
        used[offset] = arena.size_of(size)
        assert used[offset] >= size
        assert offset + used[offset] <= arena.end_bytes
        ends = sorted((start, start + length) for start, length in used.items())
        assert all(a_end <= b for (_, a_end), (b, _) in itertools.pairwise(ends))
        assert arena.used_bytes == sum(used.values())


@given(SIZES, st.randoms(use_true_random=False))
def test_the_same_schedule_gets_the_same_offsets(sizes, random):
    arena = Arena(GRANULE_BYTES)
    steps = []
    for _ in range(3):
        offsets = [arena.take(size) for size in sizes]
        steps.append(offsets)
        for offset in random.sample(offsets, len(offsets)):
            arena.free(offset)
    assert steps[0] == steps[1] == steps[2]


@given(SIZES)
def test_what_is_freed_is_one_free_range_again(sizes):
    arena = Arena(GRANULE_BYTES)
    for offset in [arena.take(size) for size in sizes]:
        arena.free(offset)
    end_bytes = arena.end_bytes
    assert arena.take(end_bytes) == 0
    assert arena.end_bytes == end_bytes
