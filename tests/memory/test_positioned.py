"""Reads and writes past the page cache: the same bytes, whatever the alignment."""

import os
import tempfile
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umtrain.memory.positioned import PositionedFile
from umtrain.memory.stream import allocate

FILE_BYTES = 2**17


@pytest.fixture(scope="module")
def file():
    with tempfile.TemporaryFile() as stream:
        os.posix_fallocate(stream.fileno(), 0, FILE_BYTES)
        positioned = PositionedFile(stream.fileno(), is_direct=True)
        yield positioned
        positioned.close()


def memory_at(lead: int, n_bytes: int) -> torch.Tensor:
    """Return fresh memory whose address is `lead` modulo a page."""
    room = torch.empty(n_bytes + 8192, dtype=torch.uint8)
    start = (lead - room.data_ptr()) % 4096
    return room[start : start + n_bytes]


offsets = st.integers(0, FILE_BYTES // 2)
sizes = st.integers(1, FILE_BYTES // 2)
# Memory lies as its place in the file does, or anywhere.
leads = st.one_of(st.none(), st.integers(0, 4095))


@given(offset=offsets, n_bytes=sizes, lead=leads, other_lead=leads, seed=st.integers(0, 9))
def test_what_was_written_is_read_however_memory_lies(
    file, offset, n_bytes, lead, other_lead, seed
):
    source = memory_at(offset % 4096 if lead is None else lead, n_bytes)
    source.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    target = memory_at(offset % 4096 if other_lead is None else other_lead, n_bytes)
    file.write(offset, source)
    file.read(offset, target)
    assert torch.equal(source, target)


@given(first=sizes, cut=st.integers(1, 4))
def test_strips_written_one_by_one_are_read_as_one(file, first, cut):
    source = memory_at(0, FILE_BYTES)
    source.random_(0, 256)
    edges = sorted({0, first, min(FILE_BYTES, first * cut), FILE_BYTES})
    for start, stop in pairwise(edges):
        file.write(start, source[start:stop])
    target = memory_at(0, FILE_BYTES)
    file.read(0, target)
    assert torch.equal(source, target)


def test_a_file_without_direct_reads_and_writes_works_too():
    with tempfile.TemporaryFile() as stream:
        file = PositionedFile(stream.fileno(), is_direct=False)
        assert not file.is_direct
        source = memory_at(0, 10_000).random_(0, 256)
        target = torch.empty_like(source)
        file.write(123, source)
        file.read(123, target)
        assert torch.equal(source, target)


def test_reading_past_the_end_is_an_error_not_a_hang():
    with tempfile.TemporaryFile() as stream:
        file = PositionedFile(stream.fileno(), is_direct=False)
        with pytest.raises(OSError, match="ends too early"):
            file.read(0, torch.empty(10, dtype=torch.uint8))


def test_an_arena_is_aligned_so_that_its_maps_go_directly():
    arena = allocate(3 * 2**20, torch.device("cpu"))
    assert arena.nbytes == 3 * 2**20
    assert arena.data_ptr() % 4096 == 0
