"""This machine's profile, measured once in a minute or two and kept.

The real kernels are timed, through torch: the convolutions of given steps, forward and backward;
passes over feature maps in the cache and out of it; the first touch of fresh memory; the spill
disk, or the link to pinned memory; and by how much all that is slower in a network than alone. A
slow machine times a part of the convolutions, drawn at random, and interpolates between those. How
each is timed is in `umtrain.planning.timing` and `timing_swapping`. What was measured is kept in a
file under a name made of the processor, torch's version, its threads and the kernel, so that
another machine or version measures its own.
"""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Literal

import psutil
import torch

from umtrain.device import cpu_has_bf16, device_name
from umtrain.errors import ConfigError, OutOfMemoryError
from umtrain.files import cache_folder, write_json
from umtrain.memory.allocator import (
    give_back_free_memory,
    has_page_pool,
    recycle_large_buffers,
    set_freed_buffers,
)
from umtrain.planning.profile import (
    CompositionSample,
    ConvolutionSample,
    Migration,
    PassSample,
    Profile,
    load_profile,
    profile_from_dict,
    profile_names,
    profile_to_dict,
)
from umtrain.planning.step import Convolution, StepTrace
from umtrain.planning.timing import (
    COMPOSED,
    PASS_BYTES,
    TORCH_DTYPES,
    distinct_convolutions,
    launch_s,
    matrix_rate,
    measure_memory,
    time_composition,
    time_convolution,
    time_passes,
)
from umtrain.planning.timing_swapping import link_of_gpu, spill_disk

_GENERIC_CPU = "generic_cpu"
_VERSION = 7  # raised where another figure is measured, or one in another way
# Seconds after which no further convolution of a precision is timed: one that the processor has
# instructions for, and one that it imitates, tens of times slower.
_CONVOLUTIONS_S = {True: 60.0, False: 10.0}
# Read-ahead of a mapped file on Linux; a fault of a page that is not there reads this much.
_READ_AHEAD_BYTES = 128 * 2**10
_FAULT_S = 1e-4

Progress = Callable[[int, int, str], None]


def machine_key(device: torch.device, device_title: str) -> str:
    """Return what a calibration is valid for, as part of a file's name."""
    facts = (
        _VERSION,
        device.type,
        device_title,
        torch.__version__,
        torch.get_num_threads(),
        platform.release(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def calibrated(
    device: torch.device,
    folder: Path,
    steps: Callable[[], list[StepTrace]],
    *,
    spill_dir: Path | None,
    again: bool,
    progress: Progress,
) -> Profile:
    """Return this machine's profile from `folder`, measuring it if it is not there, or `again`.

    `steps` gives the traces whose convolutions are timed. `progress` is told how many of all
    measurements are done, and which is next. Raises ConfigError where `folder` cannot be written,
    and OutOfMemoryError where nothing can be measured.
    """
    title = device_name(device)
    path = _path(folder, device, title)
    if path.exists() and not again:
        return _read(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        traces = steps()
        with _as_in_training(device):
            profile = calibrate(device, title, traces, spill_dir=spill_dir, progress=progress)
        write_json(path, profile_to_dict(profile))
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror}") from error
    return profile


def local_profile(device: torch.device | str) -> Profile:
    """Return this machine's profile without measuring anything.

    What a calibration left, or else the named profile that is most like it: by the GPU's name,
    by its memory where that is not known; two cores' where there is no GPU.
    """
    device = torch.device(device)
    title = device_name(device)
    path = _path(cache_folder(), device, title)
    if path.exists():
        return _read(path)
    if device.type == "cpu":
        host_bytes = psutil.virtual_memory().total
        generic = load_profile(_GENERIC_CPU)
        return dataclasses.replace(generic, device_bytes=host_bytes, host_bytes=host_bytes)
    device_bytes = int(torch.cuda.mem_get_info()[1])
    nearest = nearest_gpu(title, device_bytes)
    host_bytes = psutil.virtual_memory().total
    return dataclasses.replace(nearest, device_bytes=device_bytes, host_bytes=host_bytes)


def nearest_gpu(title: str, device_bytes: int) -> Profile:
    """Return the named profile that is most like a GPU, by its name or else by its memory."""
    profiles = [load_profile(name) for name in profile_names()]
    gpus = [p for p in profiles if p.kind == "cuda" and p.n_devices == 1]
    known = [p for p in gpus if any(part in title for part in p.device_names)]
    return min(known or gpus, key=lambda p: abs(p.device_bytes - device_bytes))


def _path(folder: Path, device: torch.device, title: str) -> Path:
    return folder / f"device-{machine_key(device, title)}.json"


def _read(path: Path) -> Profile:
    try:
        return profile_from_dict(json.loads(path.read_text(encoding="utf-8")), path)
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged ({error}); delete it") from error


@contextmanager
def _as_in_training(device: torch.device) -> Iterator[None]:
    """Use freed buffers again inside the block, and leave nothing of it behind."""
    before = recycle_large_buffers(device.type)
    try:
        yield
    finally:
        set_freed_buffers(before)
        give_back_free_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is free is what plans are judged by


def _time_convolutions(
    shapes: list[tuple[Convolution, bool]],
    device: torch.device,
    limits_s: dict[str, float],
    tell: Callable[[int, str], None],
) -> list[ConvolutionSample]:
    """Time `shapes` in each dtype, as many as come in its seconds; what does not fit is left out.

    Raises OutOfMemoryError if none fits.
    """
    found: list[ConvolutionSample] = []
    for number, (dtype, limit_s) in enumerate(limits_s.items()):
        end_s = time.monotonic() + limit_s
        for at, (shape, has_source_gradient) in enumerate(shapes):
            tell(number * len(shapes) + at, f"convolution {dtype}")
            with suppress(torch.OutOfMemoryError):
                found += time_convolution(dtype, shape, has_source_gradient, device)
            if time.monotonic() > end_s:
                break
    if shapes and not found:
        raise OutOfMemoryError(
            f"{device_name(device)} has no memory free to measure a convolution in; end what else "
            "uses it, or name a profile: device=..."
        )
    return found


def calibrate(
    device: torch.device,
    device_title: str,
    steps: Iterable[StepTrace],
    *,
    spill_dir: Path | None,
    progress: Progress,
) -> Profile:
    """Measure this machine. See `calibrated`."""
    shapes = distinct_convolutions(steps)
    Random(0).shuffle(shapes)
    passes = [(d, n) for d in TORCH_DTYPES for n in PASS_BYTES]
    is_gpu = device.type == "cuda"
    native_bf16 = is_gpu or cpu_has_bf16()
    dtypes = [dtype for dtype in TORCH_DTYPES if native_bf16 or dtype != "bf16"]
    composed = [(dtype, *blocks) for dtype in dtypes for blocks in COMPOSED[device.type]]
    n_all = len(TORCH_DTYPES) * len(shapes) + len(passes) + 2 + len(composed)
    # What is imitated comes last: its kernels would mislead the estimate of what is left to do.
    limits_s = dict.fromkeys(dtypes, _CONVOLUTIONS_S[True])
    limits_s |= {d: _CONVOLUTIONS_S[False] for d in TORCH_DTYPES if d not in dtypes}
    convolutions = _time_convolutions(
        shapes, device, limits_s, lambda done, note: progress(done, n_all, note)
    )
    n_done = len(TORCH_DTYPES) * len(shapes)
    pass_samples: list[PassSample] = []
    for done, (dtype, n_bytes) in enumerate(passes, n_done):
        progress(done, n_all, f"passes {dtype}")
        pass_samples += time_passes(dtype, n_bytes, device)
    n_done += len(passes)
    progress(n_done, n_all, "memory")
    memory = measure_memory(device)
    progress(n_done + 1, n_all, "link to host memory" if is_gpu else "spill disk and swapping")
    link = link_of_gpu(device) if is_gpu else spill_disk(spill_dir)
    n_done += 2
    kind: Literal["cpu", "cuda"] = "cuda" if is_gpu else "cpu"
    profile = Profile(
        name="this machine",
        title=device_title,
        kind=kind,
        device_bytes=memory.device_bytes,
        host_bytes=memory.host_bytes,
        out_bytes_per_s=link.out_bytes_per_s,
        in_bytes_per_s=link.in_bytes_per_s,
        link_busy_s_per_byte=link.busy_s_per_byte,
        transfer_s=link.transfer_s,
        memory_bytes_per_s=memory.bytes_per_s,
        matrix_flops_per_s={
            "bf16": matrix_rate("bf16", device, is_native=native_bf16),
            "fp32": matrix_rate("fp32", device, is_native=True),
        },
        launch_s=launch_s(device),
        migration=migration_of(kind, device_title, memory.device_bytes),
        native_bf16=native_bf16,
        has_page_pool=has_page_pool(),
        first_touch_s_per_byte=memory.first_touch_s_per_byte,
        convolution_samples=tuple(convolutions),
        pass_samples=tuple(pass_samples),
    )
    samples: list[CompositionSample | None] = []
    for done, (dtype, side_px, n_blocks) in enumerate(composed, n_done):
        progress(done, n_all, f"blocks {dtype}")
        samples.append(time_composition(dtype, side_px, n_blocks, profile))
    progress(n_all, n_all, "")
    return dataclasses.replace(profile, composition_samples=tuple(filter(None, samples)))


def migration_of(kind: str, device_title: str, device_bytes: int) -> Migration:
    """Return how pages come on demand, which is not measured: of a GPU, as on the nearest one."""
    if kind == "cuda":
        return nearest_gpu(device_title, device_bytes).migration
    return Migration(_READ_AHEAD_BYTES, 1, _FAULT_S)
