"""Managed pages on a GPU: what is asked of the driver, in which order, after which event."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from umtrain.memory.layout import Layout
from umtrain.memory.meters import CpuMeter, CudaMeter
from umtrain.memory.paging_managed import MANAGED_BLOCK_BYTES as UNIT
from umtrain.memory.paging_managed import ManagedPager, inner_ranges, outer_ranges
from umtrain.memory.trace import Trace
from umtrain.memory.um_group_prefetch import PrefetchedUnifiedMemory


def _pager(driver, room_bytes=None):
    return ManagedPager(driver, "cpu", room_bytes, CpuMeter(), Trace(), nullcontext)


def _block(pager, n_bytes=8 * UNIT):
    tensor = torch.zeros(n_bytes // 4)
    return pager.move(tensor.detach(), Layout.of(tensor))


def test_eviction_is_queued_behind_the_compute_issued_so_far(driver):
    pager = _pager(driver)
    pager.evict("group", [_block(pager)])
    kinds = [(call[0], call[-1] if call[0] == "prefetch" else call[1]) for call in driver.calls]
    assert kinds == [("record", "compute"), ("wait", "out"), ("prefetch", "out"), ("record", "out")]
    assert driver.calls[1] == ("wait", "out", driver.calls[0][2])


def test_compute_waits_for_a_prefetch_before_it_reads(driver):
    pager = _pager(driver)
    block = _block(pager)
    pager.evict("group", [block])
    pager.prefetch("group", [block])
    arrival = driver.named("record")[-1]
    assert arrival[1] == "in"
    block.load(Layout.of(torch.zeros(UNIT)))
    assert driver.calls[-1] == ("wait", "compute", arrival[2])


def test_a_migration_in_waits_for_the_migration_out(driver):
    pager = _pager(driver)
    block = _block(pager)
    pager.evict("group", [block])
    left = driver.named("record")[-1][2]
    pager.prefetch("group", [block])
    back = next(i for i, call in enumerate(driver.calls) if call[-2:] == ("device", "in"))
    assert ("wait", "in", left) in driver.calls[:back]


def test_a_tensor_that_forward_can_still_read_has_a_reader(driver):
    pager = _pager(driver)
    tensor = torch.zeros(2 * UNIT)
    block = pager.move(tensor.detach(), Layout.of(tensor))
    assert block.has_forward_reader
    view = tensor[3:]
    del tensor
    assert block.has_forward_reader
    del view
    assert not block.has_forward_reader


def test_prefetch_stops_where_the_budget_ends(driver):
    pager = _pager(driver, room_bytes=10 * UNIT)
    blocks = [_block(pager), _block(pager)]
    pager.evict("group", blocks)
    driver.calls.clear()
    pager.prefetch("group", blocks)
    assert [b.is_in for b in blocks] == [True, False]


def test_room_is_there_again_when_a_tensor_is_gone(driver):
    pager = _pager(driver, room_bytes=10 * UNIT)
    first, second = _block(pager), _block(pager)
    pager.evict("group", [second])
    pager.prefetch("group", [second])
    assert not second.is_in
    del first
    pager.prefetch("group", [second])
    assert second.is_in


def test_hits_and_late_prefetches_are_told_apart(driver):
    pager = _pager(driver)
    blocks = [_block(pager), _block(pager)]
    for block in blocks:
        pager.evict("group", [block])
        pager.prefetch("group", [block])
    driver.done.add(blocks[0].migrated)
    for block in blocks:
        block.load(Layout.of(torch.zeros(UNIT)))
    counters = pager._meter.counters
    assert (counters.prefetch_hits, counters.prefetch_late) == (1, 1)


def test_ranges_are_merged_and_whole_blocks_of_the_driver(driver):
    pager = _pager(driver)
    storage = torch.zeros(4 * UNIT, dtype=torch.uint8)
    halves = [storage[: 2 * UNIT], storage[2 * UNIT :]]
    blocks = [pager.move(half.detach(), Layout.of(half)) for half in halves]
    ((inner_start, inner_bytes),) = inner_ranges(blocks)
    ((outer_start, outer_bytes),) = outer_ranges(blocks)
    start = storage.data_ptr()
    assert inner_start % UNIT == inner_bytes % UNIT == outer_start % UNIT == outer_bytes % UNIT == 0
    assert start <= inner_start < start + UNIT
    assert start - UNIT < outer_start <= start
    assert outer_bytes - inner_bytes <= 2 * UNIT


class _Residual(nn.Module):
    """The first block's output is read again by the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(5)
        )

    def forward(self, x):
        early = self.blocks[0](x)
        y = early
        for block in self.blocks[1:-1]:
            y = block(y)
        return self.blocks[-1](y + early)


@pytest.fixture
def evictions(driver, monkeypatch):
    """Return what a step of um_group_prefetch on `_Residual` evicts, as (group, addresses)."""
    log = []

    def create(self, measured):
        pager = _pager(driver, room_bytes=0)
        evict = pager.evict

        def noted(name, blocks):
            log.append((name, {block.span.data_ptr() for block in blocks}))
            evict(name, blocks)

        pager.evict = noted
        return pager

    monkeypatch.setattr(PrefetchedUnifiedMemory, "_create_pager", create)
    return log


def test_nothing_migrates_before_its_last_reader(evictions):
    from umtrain import memory

    model, batch = _Residual(), torch.randn(1, 8, 64, 64)
    strategy = memory.create("um_group_prefetch")
    strategy.prepare(model, batch)
    early = []
    entered = []
    model.blocks[0][1].register_forward_hook(lambda m, a, output: early.append(output.data_ptr()))
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda m, a, i=index: entered.append((i, len(evictions))))
    with strategy.step():
        model(batch).sum().backward()
    strategy.close()
    n_before_last_block = dict(entered)[4]
    gone_early = set().union(*(addresses for _, addresses in evictions[:n_before_last_block]))
    assert gone_early
    assert early[0] not in gone_early


def test_groups_leave_in_forward_and_return_in_reverse(evictions, driver):
    from umtrain import memory

    model, batch = _Residual(), torch.randn(1, 8, 512, 512)
    strategy = memory.create("um_group_prefetch")
    strategy.prepare(model, batch)
    with strategy.step():
        model(batch).sum().backward()
    strategy.close()
    names = list(dict.fromkeys(name for name, addresses in evictions if addresses))
    assert names == sorted(names)
    outward = {call[1] for call in driver.named("prefetch") if call[3] == "host"}
    inward = {call[1] for call in driver.named("prefetch") if call[3] == "device"}
    assert outward
    assert inward
    assert strategy.stats().swapped_in_bytes == strategy.stats().swapped_out_bytes


def test_what_tensors_asked_for_counts_where_memory_is_managed(monkeypatch):
    figures = {"allocated_bytes.all.peak": 20 * 2**20, "requested_bytes.all.peak": 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: figures)
    meter = CudaMeter()
    assert meter._device_peak_bytes() == 20 * 2**20
    meter.count_managed_memory()
    assert meter._device_peak_bytes() == 3 * 2**20
