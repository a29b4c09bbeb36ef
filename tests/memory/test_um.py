"""Unified memory without a GPU: saved tensors in the mapped file, in place, paged by the OS."""

import errno
import os
from concurrent.futures import wait

import pytest
import torch
from torch import nn

from umtrain import memory
from umtrain.errors import DeviceError
from umtrain.memory import linux
from umtrain.memory.layout import Layout
from umtrain.memory.meters import CpuMeter
from umtrain.memory.paging_mapped import MappedPager
from umtrain.memory.trace import Trace
from umtrain.memory.working_set import LayerUse, WorkingSets

MIB = 2**20
_NOTHING = WorkingSets([], parameter_bytes=0)


@pytest.fixture
def make_pager(tmp_path):
    """Return a function that makes a pager with so much room."""
    pagers = []

    def make(room_bytes, measured=_NOTHING):
        pager = MappedPager(tmp_path, measured, None, lambda: room_bytes, CpuMeter(), Trace())
        pagers.append(pager)
        return pager

    yield make
    for pager in pagers:
        pager.close()


def _save(pager, n_mib=1):
    tensor = torch.randn(n_mib * MIB // 4)
    layout = Layout.of(tensor)
    return pager.move(tensor, layout), layout, tensor


def _resident_mib(block):
    n_bytes = block.n_bytes // linux.PAGE_BYTES * linux.PAGE_BYTES
    return linux.resident_bytes(block.block.address, n_bytes) / MIB


def test_backward_reads_the_mapping_in_place(make_pager):
    block, layout, tensor = _save(make_pager(None))
    loaded = block.load(layout)
    address = block.block.address
    assert address <= loaded.data_ptr() < address + block.n_bytes
    assert torch.equal(loaded, tensor)


def test_saved_tensors_stay_on_the_heap_where_the_budget_holds_a_step_twice_over(
    make_pager, fixed_room
):
    saving = LayerUse("layer", "", storages={1: 5 * MIB}, saved={1: 2 * MIB})
    measured = WorkingSets([saving], parameter_bytes=MIB)
    pager = make_pager(None, measured)
    tensor = torch.randn(100)
    for room_bytes, is_moved in ((16 * MIB, False), (16 * MIB - 1, True), (0, True)):
        pager.begin(fixed_room(room_bytes))
        assert pager.wants(tensor) == is_moved


def test_without_a_budget_a_machine_that_has_not_the_room_pages_too(make_pager, monkeypatch):
    monkeypatch.setattr("umtrain.memory.budget.available_bytes", lambda: 16 * MIB)
    strategy = memory.create("um")
    strategy.prepare(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()), torch.randn(1, 4, 1024, 1024))
    is_moved = strategy._pager.wants(torch.randn(100))
    strategy.close()
    assert is_moved


def test_least_recently_used_go_out_of_ram_when_there_is_no_room(make_pager):
    pager = make_pager(3 * MIB + MIB // 2)
    saved = [_save(pager) for _ in range(3)]
    saved[0][0].load(saved[0][1])
    saved.append(_save(pager))
    assert [round(_resident_mib(block)) for block, _, _ in saved] == [1, 0, 1, 1]
    assert MIB <= pager._meter.counters.swapped_out_bytes < 1.1 * MIB


def test_what_went_out_comes_back_as_it_was(make_pager):
    pager = make_pager(0)
    saved = [_save(pager) for _ in range(4)]
    faults_before = linux.major_faults()
    for block, layout, tensor in reversed(saved):
        assert torch.equal(block.load(layout), tensor)
    assert linux.major_faults() > faults_before


def test_without_a_budget_nothing_goes_out(make_pager):
    pager = make_pager(None)
    saved = [_save(pager) for _ in range(4)]
    assert all(_resident_mib(block) == 1 for block, _, _ in saved)
    assert pager._meter.counters.swapped_out_bytes == 0


def test_a_block_that_was_written_once_goes_out_again_without_writing(make_pager):
    pager = make_pager(None)
    block, layout, tensor = _save(pager)
    for _ in range(3):
        pager.evict("group", [block])
        assert torch.equal(block.load(layout), tensor)
    assert pager._meter.counters.swapped_in_bytes == 3 * block.n_bytes


def test_freed_blocks_leave_ram_when_there_is_a_budget(make_pager):
    pager = make_pager(8 * MIB)
    block, _, _ = _save(pager)
    address = block.block.address
    assert linux.resident_bytes(address, MIB) == MIB
    del block
    pager._spill.collect()
    assert linux.resident_bytes(address, MIB) == 0


def test_a_page_out_that_failed_is_told_to_the_reader(make_pager, monkeypatch):
    def broken_disk(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    pager = make_pager(None)
    block, layout, _ = _save(pager)
    monkeypatch.setattr(linux, "write_back", broken_disk)
    pager.evict("group", [block])
    wait([pager._pages[block.block.offset].migration])
    with pytest.raises(DeviceError, match=r"could not be read or written \(Input/output error\)"):
        block.load(layout)


def test_prefetch_stops_where_the_budget_ends(make_pager):
    pager = make_pager(2 * MIB + MIB // 2)
    saved = [_save(pager) for _ in range(4)]
    pager.evict("all", [block for block, _, _ in saved])
    for block, _layout, _ in saved:
        pager._finish_migration(pager._pages[block.block.offset])
    pager.prefetch("all", [block for block, _, _ in saved])
    ahead = [pager._pages[block.block.offset].is_prefetched for block, _, _ in saved]
    assert ahead == [True, True, False, False]


def test_every_saved_map_is_in_the_file_once(room):
    room(128 * 1024)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(16, 4, 1)
    )
    x = torch.randn(1, 4, 64, 64)
    strategy = memory.create("um")
    strategy.prepare(model, x)
    with strategy.step():
        model(x).sum().backward()
    strategy.close()
    granule = 64 * 1024
    # The input and the ReLU's output, which ReLU and the second convolution share.
    assert strategy.stats().host_peak_bytes == x.nbytes + 4 * x.nbytes
    assert x.nbytes % granule == 0
