"""The largest size that fits is found, in few tries where memory grows evenly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.planning.limits import Secant, largest

BATCHES, SIDES = 1, 2


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


def searched(shares_at, power, known=(), first=None, least=32, step=1, most=2**18):
    """Return what `Secant` finds where memories are as full as `shares_at` says, and the tries."""
    secant, asked = Secant(power, known, first), []

    def fits(size):
        asked.append(size)
        shares = shares_at(size)
        secant.note(size, shares)
        return max(shares) <= 1

    return largest(fits, least, step, most, secant), asked


@pytest.mark.parametrize("power", [BATCHES, SIDES])
@given(st.floats(0.0, 0.9), st.floats(33.0, 6000.0), st.integers(1, 64))
def test_where_memory_grows_evenly_five_tries_do(power, resident, full_at, step):
    def shares_at(size):
        return (resident + (1 - resident) * (size / full_at) ** power,)

    found, asked = searched(shares_at, power, step=step)
    assert shares_at(found)[0] <= 1 < shares_at(found + step)[0]
    assert len(asked) <= 5


@given(st.integers(100, 5000), st.integers(100, 5000))
def test_where_a_memory_fills_only_once_another_is_full_few_more_do(device_full, host_share):
    host_full = device_full + host_share

    def shares_at(size):
        return min(0.9, 0.9 * size / device_full), max(0, size - device_full) / host_share

    found, asked = searched(shares_at, BATCHES)
    assert found == host_full
    assert len(asked) <= 14


@given(st.integers(40, 50000))
def test_where_nothing_says_how_full_memory_is_halving_finds_it(limit):
    found, asked = searched(lambda size: (0.9 if size <= limit else 2.0,), SIDES)
    assert found == limit
    assert len(asked) <= 5 + 4 * limit.bit_length()


def test_a_size_that_is_known_is_tried_in_the_place_of_one_close_by():
    found, asked = searched(lambda size: (size / 1000,), BATCHES, known=(990, 1001), first=1001)
    assert found == 1000
    assert asked == [32, 1001, 990, 1000]
    _, unaided = searched(lambda size: (size / 1000,), BATCHES)
    assert {990, 1001}.isdisjoint(set(unaided[1:3]))
