"""This machine's profile, measured once in two or three minutes and kept.

The real kernels are timed, through torch: the convolutions of given steps, forward and backward,
with the memory that they take for themselves; passes over feature maps in the cache and out of it;
the first touch of fresh memory; the spill disk, or the link to pinned memory; what launching costs
in a network, and by how much all that is slower there than alone. A slow machine times a part of
the convolutions, drawn at random, and interpolates between those. How each is timed is in
`umtrain.planning.timing`, `timing_networks` and `timing_swapping`. What was measured is kept in a
file under a name made of the processor, torch's version, its threads and the kernel, so that
another machine or version measures its own.
"""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    PASS_BYTES,
    TORCH_DTYPES,
    distinct_convolutions,
    left_out_if_it_does_not_fit,
    matrix_rate,
    measure_memory,
    time_convolution,
    time_passes,
)
from umtrain.planning.timing_networks import (
    COMPOSED_PX,
    LAUNCHED_PX,
    TimedStep,
    TrainedNetwork,
    compositions,
    launch_s,
    trained_networks,
)
from umtrain.planning.timing_swapping import link_of_gpu, spill_disk

_GENERIC_CPU = "generic_cpu"
_VERSION = 9  # raised where another figure is measured, or one in another way
# Seconds after which no further convolution of a precision is timed: one that the processor has
# instructions for, and one that it imitates, tens of times slower.
_CONVOLUTIONS_S = {True: 60.0, False: 10.0}
_TRAINED_EVERY_S = 15.0
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
        timed = steps()
        with _as_in_training(device):
            profile = calibrate(device, title, timed, spill_dir=spill_dir, progress=progress)
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


class _Told:
    """Tells `progress` how much of `n_all` is done."""

    def __init__(self, progress: Progress, n_all: int) -> None:
        self._progress, self._n_all, self._n_done = progress, n_all, 0

    def begin(self, note: str) -> None:
        """Say that the next measurement begins, which `note` names."""
        self._progress(self._n_done, self._n_all, note)
        self._n_done += 1

    def skip(self, n: int) -> None:
        """Count `n` measurements as done that are not made."""
        self._n_done += n

    def end(self) -> None:
        """Say that all is done."""
        self._progress(self._n_all, self._n_all, "")


class _Between:
    """Has networks train between other measurements, now and then."""

    def __init__(self, networks: list[TrainedNetwork]) -> None:
        self._networks, self._next_s = networks, time.monotonic() + _TRAINED_EVERY_S

    def train(self, *, at_once: bool = False) -> float:
        """Train if it is time to; returns the seconds that this took."""
        start_s = time.monotonic()
        if not at_once and start_s < self._next_s:
            return 0.0
        for network in self._networks:
            network.train()
        end_s = time.monotonic()
        self._next_s = end_s + _TRAINED_EVERY_S
        return end_s - start_s


def _shapes(trained: list[StepTrace], steps: list[StepTrace]) -> list[tuple[Convolution, bool]]:
    """Return the convolutions of both, those of networks that are trained first."""
    both = [distinct_convolutions(trained), distinct_convolutions(steps)]
    for shapes in both:
        Random(0).shuffle(shapes)
    in_order = dict.fromkeys(shape for shapes in both for shape, _ in shapes)
    with_gradient = {shape for shapes in both for shape, has_gradient in shapes if has_gradient}
    return [(shape, shape in with_gradient) for shape in in_order]


def _time_convolutions(
    shapes: dict[str, list[tuple[Convolution, bool]]],
    device: torch.device,
    limits_s: dict[str, float],
    told: _Told,
    between: _Between,
) -> list[ConvolutionSample]:
    """Time each dtype's shapes, as many as come in its seconds; what does not fit is left out.

    Raises OutOfMemoryError if none fits.
    """
    found: list[ConvolutionSample] = []
    for dtype, mine in shapes.items():
        end_s = time.monotonic() + limits_s[dtype]
        for at, (shape, has_source_gradient) in enumerate(mine, 1):
            told.begin(f"convolution {dtype}")
            end_s += between.train()
            with left_out_if_it_does_not_fit():
                found += time_convolution(dtype, shape, has_source_gradient, device)
            if time.monotonic() > end_s:
                told.skip(len(mine) - at)
                break
    if any(shapes.values()) and not found:
        raise _no_memory(device, "a convolution")
    return found


def _no_memory(device: torch.device, what: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{device_name(device)} has no memory free to measure {what} in; end what else uses it, "
        "or name a profile: device=..."
    )


def calibrate(
    device: torch.device,
    device_title: str,
    steps: list[StepTrace],
    *,
    spill_dir: Path | None,
    progress: Progress,
) -> Profile:
    """Measure this machine. See `calibrated`."""
    is_gpu = device.type == "cuda"
    native_bf16 = is_gpu or cpu_has_bf16()
    # What is imitated comes last: its kernels would mislead the estimate of what is left to do.
    is_native = {"fp32": True, "bf16": native_bf16}
    sides_px = (LAUNCHED_PX, *COMPOSED_PX[device.type])
    native = [dtype for dtype, known in is_native.items() if known]
    networks = trained_networks(native, sides_px, device)
    shapes = {
        dtype: _shapes([each.trace for each in networks if each.dtype == dtype], steps)
        for dtype in is_native
    }
    passes = [(dtype, n_bytes) for dtype in TORCH_DTYPES for n_bytes in PASS_BYTES]
    told = _Told(progress, sum(map(len, shapes.values())) + len(passes) + 2)
    limits_s = {dtype: _CONVOLUTIONS_S[known] for dtype, known in is_native.items()}
    between = _Between(networks)
    convolutions = _time_convolutions(shapes, device, limits_s, told, between)
    pass_samples: list[PassSample] = []
    for dtype, n_bytes in passes:
        told.begin(f"passes {dtype}")
        between.train()
        pass_samples += time_passes(dtype, n_bytes, device)
    between.train(at_once=True)
    told.begin("memory")
    memory = measure_memory(device)
    told.begin("link to host memory" if is_gpu else "spill disk and swapping")
    link = link_of_gpu(device) if is_gpu else spill_disk(spill_dir)
    kind: Literal["cpu", "cuda"] = "cuda" if is_gpu else "cpu"
    kernels = Profile(
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
        launch_s=0.0,
        migration=migration_of(kind, device_title, memory.device_bytes),
        native_bf16=native_bf16,
        has_page_pool=has_page_pool(),
        first_touch_s_per_byte=memory.first_touch_s_per_byte,
        convolution_samples=tuple(convolutions),
        pass_samples=tuple(pass_samples),
    )
    told.end()
    return _with_networks(kernels, networks)


def _with_networks(kernels: Profile, networks: list[TrainedNetwork]) -> Profile:
    """Return the profile with what launching costs, and with what kernels take in a network."""
    steps: dict[tuple[str, int], list[TimedStep]] = {}
    for network in networks:
        step = network.timed(kernels)
        if step is not None:
            steps.setdefault((network.dtype, network.side_px), []).append(step)
    small = [each for (_, px), found in steps.items() if px == LAUNCHED_PX for each in found]
    if not small:
        raise _no_memory(torch.device(kernels.kind), "a network")
    launched_s = launch_s(small, kernels.kind)
    if launched_s is None:
        launched_s = nearest_gpu(kernels.title, kernels.device_bytes).launch_s
    profile = dataclasses.replace(kernels, launch_s=launched_s)
    samples: list[CompositionSample] = []
    for dtype in TORCH_DTYPES:
        larger = [found for (of, px), found in steps.items() if of == dtype and px != LAUNCHED_PX]
        samples += compositions(dtype, larger, profile)
    return dataclasses.replace(profile, composition_samples=tuple(samples))


def migration_of(kind: str, device_title: str, device_bytes: int) -> Migration:
    """Return how pages come on demand, which is not measured: of a GPU, as on the nearest one."""
    if kind == "cuda":
        return nearest_gpu(device_title, device_bytes).migration
    return Migration(_READ_AHEAD_BYTES, 1, _FAULT_S)
