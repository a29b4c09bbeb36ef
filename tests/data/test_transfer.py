import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.transfer import receive, send


@given(st.lists(st.sampled_from([0, 1, 1000, 65536, 65537, 200_003]), max_size=4))
def test_what_is_received_is_what_was_sent(sizes):
    one, other = multiprocessing.Pipe()
    arrays = [np.arange(n, dtype=np.uint8) for n in sizes]
    send(one, {"arrays": arrays, "name": "s"})
    received = receive(other)
    assert received["name"] == "s"
    assert len(received["arrays"]) == len(arrays)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, received["arrays"], strict=True))
    one.close()
    other.close()


def n_descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_large_array_outlives_its_sender_and_leaves_no_descriptor():
    one, other = multiprocessing.Pipe()
    before = n_descriptors()
    send(one, np.ones(2**20))
    one.close()
    received = receive(other)
    received += 1
    assert received.sum() == 2 * 2**20
    del received
    assert n_descriptors() == before - 1
    other.close()


def test_the_other_end_being_gone_is_told():
    one, other = multiprocessing.Pipe()
    one.close()
    with pytest.raises(EOFError):
        receive(other)
    other.close()
