"""What a calibration times of swapping: links, and what transfers cost the cores that compute."""

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umtrain import memory
from umtrain.device import cpu_has_bf16
from umtrain.errors import DeviceError, OutOfMemoryError
from umtrain.memory.hooked import SMALLEST_MOVED_BYTES
from umtrain.memory.io_threads import start_io_threads
from umtrain.memory.options import Options
from umtrain.memory.positioned import PositionedFile
from umtrain.planning.profile import load_profile
from umtrain.planning.timing import PROBE_BYTES, least_s
from umtrain.streaming.storage import ALIGNMENT_BYTES

_log = logging.getLogger(__name__)

_N_TIMES = 3
_COMPUTED_PX = 128
# Blocks of ResNet-50 that are swapped, pixels a side and how many: transfers cost by their number
# where maps are small, by their bytes where maps are large.
_SWAPPED = ((32, 6), (128, 3))
_CHANNELS = 256
_N_STEPS = 4


@dataclass(frozen=True)
class Link:
    """Bytes/s out of device memory and back; what a byte, and a transfer, cost computing cores."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    busy_s_per_byte: float = 0.0
    transfer_s: float = 0.0


def link_of_gpu(device: torch.device) -> Link:
    """Return the link from a GPU to pinned memory."""
    pinned = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    x = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    out_s = least_s(lambda: pinned.copy_(x, non_blocking=True), device)
    in_s = least_s(lambda: x.copy_(pinned, non_blocking=True), device)
    return Link(PROBE_BYTES / out_s, PROBE_BYTES / in_s)


def spill_disk(folder: Path | None) -> Link:
    """Return the link to the spill file, used as strategies do, beside a network that computes."""
    fresh = torch.ones(PROBE_BYTES + ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -fresh.data_ptr() % ALIGNMENT_BYTES
    data = fresh[start : start + PROBE_BYTES]
    with tempfile.TemporaryFile(dir=folder or tempfile.gettempdir(), buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, PROBE_BYTES)
        spill = PositionedFile(file.fileno(), is_direct=True)
        try:
            out_s = _beside_computing(lambda: spill.write(0, data))
            in_s = _beside_computing(lambda: spill.read(0, data))
        finally:
            spill.close()
    transfer_s, busy_s_per_byte = _costs_of_swapping(folder)
    return Link(PROBE_BYTES / out_s, PROBE_BYTES / in_s, busy_s_per_byte, transfer_s)


def _beside_computing(transfer: Callable[[], Any]) -> float:
    """Return the seconds of a transfer while all cores compute."""
    layer = _bottlenecks(1).requires_grad_(False).eval()
    x = _noise(_COMPUTED_PX)

    def timed() -> None:
        start_s = time.perf_counter()
        transfer()
        times_s.append(time.perf_counter() - start_s)

    times_s: list[float] = []
    transfer()
    with start_io_threads("calibration") as executor:
        for _ in range(_N_TIMES):
            future = executor.submit(timed)
            while not future.done():
                layer(x)
            future.result()
    return statistics.median(times_s)


def _costs_of_swapping(folder: Path | None) -> tuple[float, float]:
    """Return what a transfer, and a byte, cost the cores: by how much steps of `lms` are longer."""
    amounts, costs_s = [], []
    try:
        for side_px, n_blocks in _SWAPPED:
            model, x = _bottlenecks(n_blocks), _noise(side_px)
            n_transfers = 2 * _n_moved(model, x)
            for _ in range(_N_TIMES):
                kept_s, _ = _step("vanilla", model, x, folder)
                swapped_s, n_bytes = _step("lms", model, x, folder)
                amounts.append((n_transfers, n_bytes))
                costs_s.append(swapped_s - kept_s)
    except (OutOfMemoryError, DeviceError) as error:
        generic = load_profile("generic_cpu")
        _log.warning(
            "what swapping costs was not measured, but taken from %s: %s", generic.name, error
        )
        return generic.transfer_s, generic.link_busy_s_per_byte
    return fit_costs(amounts, costs_s)


def fit_costs(amounts: Sequence[tuple[int, int]], costs_s: Sequence[float]) -> tuple[float, float]:
    """Return the seconds a transfer and a byte, neither below 0, that come nearest to `costs_s`.

    `amounts` are the transfers of each step, and their bytes.
    """
    from scipy.optimize import nnls

    in_mib = [(n_transfers, n_bytes / 2**20) for n_transfers, n_bytes in amounts]
    (transfer_s, s_per_mib), _ = nnls(in_mib, costs_s)
    return float(transfer_s), float(s_per_mib) / 2**20


def _n_moved(model: nn.Module, x: Tensor) -> int:
    """Return how many tensors a strategy moves that moves whatever is saved."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    found = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.nbytes >= SMALLEST_MOVED_BYTES["cpu"] and tensor.data_ptr() not in weights:
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _autocast():
        model(x)
    return len({tensor.data_ptr() for tensor in found})


def _step(name: str, model: nn.Module, x: Tensor, folder: Path | None) -> tuple[float, int]:
    """Return the seconds that a step computes for under a strategy, and the bytes that it moves."""
    strategy = memory.create_from(name, Options.parse(device="cpu", spill_dir=folder))
    times_s = []
    try:
        with _autocast():
            model = strategy.prepare(model, x)
        for _ in range(_N_STEPS):
            start_s = time.perf_counter()
            with strategy.step():
                with _autocast():
                    output = model(x)
                # A loss of a map would hand down its gradient in rows.
                torch.autograd.backward(output, torch.ones_like(output))
            took_s = time.perf_counter() - start_s
            stats = strategy.stats()
            times_s.append(took_s - (stats.stall_s or 0.0))
            model.zero_grad()
    finally:
        strategy.close()
    n_bytes = (stats.swapped_out_bytes or 0) + (stats.swapped_in_bytes or 0)
    return statistics.median(times_s[1:]), n_bytes


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16())


def _noise(side_px: int) -> Tensor:
    x = torch.randn(1, _CHANNELS, side_px, side_px)
    return x.to(memory_format=torch.channels_last)


def _bottlenecks(n_blocks: int) -> nn.Module:
    """Return blocks of ResNet-50, in channels-last; their input has `_CHANNELS`."""
    from torchvision.models.resnet import Bottleneck

    width = _CHANNELS // Bottleneck.expansion
    blocks = [Bottleneck(_CHANNELS, width) for _ in range(n_blocks)]
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)
