"""Bisection finds the largest size that fits, and asks little."""

from hypothesis import given
from hypothesis import strategies as st

from umtrain.planning.limits import largest


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5000), st.integers(1, 5000))
def test_the_largest_that_fits_is_found(least, step, spare, limit):
    most = least + spare
    sizes = range(least, most + 1, step)
    expected = max((size for size in sizes if size <= limit), default=None)
    assert largest(lambda size: size <= limit, least, step, most) == expected


@given(st.integers(1, 10**6))
def test_it_asks_about_each_size_once_and_about_few(limit):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    largest(fits, 1, 1, 10**6)
    assert len(asked) == len(set(asked))
    assert len(asked) <= 2 * limit.bit_length() + 2


def test_nothing_above_the_least_is_asked_about_where_that_does_not_fit():
    asked = []
    assert largest(lambda size: asked.append(size), 64, 64, 4096) is None
    assert asked == [64]
