"""This machine's profile, measured once in a minute or two and kept.

The real kernels are timed, through torch: the convolutions of given steps, forward and backward;
passes over feature maps in the cache and out of it; the first touch of fresh memory; the spill
disk, or the link to pinned memory. A slow machine times a part of the convolutions, drawn at
random, and interpolates between those. Each figure is the median of a few runs after one that is
left out. What was measured is kept in a file under a name made of the processor, torch's version,
its threads and the kernel, so that another machine or version measures its own.
"""

import dataclasses
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from umtrain.device import cpu_has_bf16, device_name
from umtrain.errors import ConfigError
from umtrain.files import cache_folder, write_json
from umtrain.planning.profile import (
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

_aten = torch.ops.aten
_GENERIC_CPU = "generic_cpu"
_VERSION = 3  # of what is measured: raised where another figure is added
_N_TIMES = 3
_LONG_S = 0.1  # an operation that takes longer is timed once
_PASS_BYTES = (2 * 2**20, 2**27)  # in a processor's cache, and far out of it
_CHANNELS = 64
_N_BLOCKS, _SMALL_PX = 20, 4
_PROBE_BYTES = 2**28
# Seconds after which no further convolution of a precision is timed: one that the processor has
# instructions for, and one that it imitates, tens of times slower.
_CONVOLUTIONS_S = {True: 60.0, False: 10.0}
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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
    measurements are done, and which is next. Raises ConfigError where `folder` cannot be written.
    """
    title = device_name(device)
    path = _path(folder, device, title)
    if path.exists() and not again:
        return _read(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profile = calibrate(device, title, steps(), spill_dir=spill_dir, progress=progress)
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


def calibrate(
    device: torch.device,
    device_title: str,
    steps: Iterable[StepTrace],
    *,
    spill_dir: Path | None,
    progress: Progress,
) -> Profile:
    """Measure this machine. See `calibrated`."""
    shapes = _distinct_convolutions(steps)
    Random(0).shuffle(shapes)
    passes = [(d, n) for d in _TORCH_DTYPES for n in _PASS_BYTES]
    n_done, n_all = 0, len(_TORCH_DTYPES) * len(shapes) + len(passes) + 2
    native_bf16 = device.type == "cuda" or cpu_has_bf16()
    convolutions: list[ConvolutionSample] = []
    for i, dtype in enumerate(_TORCH_DTYPES):
        n_done = i * len(shapes)
        end_s = time.monotonic() + _CONVOLUTIONS_S[native_bf16 or dtype != "bf16"]
        for shape, has_source_gradient in shapes:
            progress(n_done, n_all, f"convolution {dtype}")
            convolutions += _time_convolution(dtype, shape, has_source_gradient, device)
            n_done += 1
            if time.monotonic() > end_s:
                break
    n_done = len(_TORCH_DTYPES) * len(shapes)
    pass_samples: list[PassSample] = []
    for dtype, n_bytes in passes:
        progress(n_done, n_all, f"passes {dtype}")
        pass_samples += _time_passes(dtype, n_bytes, device)
        n_done += 1
    progress(n_done, n_all, "memory")
    memory = _measure_memory(device)
    progress(n_done + 1, n_all, "link to host memory")
    link = _link_of_gpu(device) if device.type == "cuda" else _spill_disk(spill_dir)
    progress(n_all, n_all, "")
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    return Profile(
        name="this machine",
        title=device_title,
        kind=kind,
        device_bytes=memory.device_bytes,
        host_bytes=memory.host_bytes,
        out_bytes_per_s=link[0],
        in_bytes_per_s=link[1],
        memory_bytes_per_s=memory.bytes_per_s,
        matrix_flops_per_s={
            "bf16": _matrix_rate("bf16", device, is_native=native_bf16),
            "fp32": _matrix_rate("fp32", device, is_native=True),
        },
        launch_s=_launch_s(device),
        migration=migration_of(kind, device_title, memory.device_bytes),
        native_bf16=native_bf16,
        first_touch_s_per_byte=memory.first_touch_s_per_byte,
        convolution_samples=tuple(convolutions),
        pass_samples=tuple(pass_samples),
    )


def _distinct_convolutions(steps: Iterable[StepTrace]) -> list[tuple[Convolution, bool]]:
    """Return each convolution once, and whether its input has a gradient."""
    with_gradient: dict[Convolution, bool] = {}
    for step in steps:
        for operation in step.operations:
            shape = operation.convolution
            if shape is None or operation.phase != "backward":
                continue
            flops = _flops(shape)
            with_gradient[shape] = with_gradient.get(shape, False) or operation.flops > 1.5 * flops
    return list(with_gradient.items())


def _flops(shape: Convolution) -> float:
    per_output = 2 * shape.in_channels // shape.groups
    for side in shape.kernel:
        per_output *= side
    n_outputs = shape.out_channels
    for side in shape.output:
        n_outputs *= side
    return float(per_output * n_outputs)


def _time_convolution(
    dtype: str, shape: Convolution, has_source_gradient: bool, device: torch.device
) -> Iterator[ConvolutionSample]:
    kind = _TORCH_DTYPES[dtype]
    n_images, *sides = shape.output
    rows = [side * stride for side, stride in zip(sides, shape.stride, strict=True)]
    padding = [side // 2 for side in shape.kernel]
    memory_format = torch.channels_last if len(sides) == 2 else torch.channels_last_3d
    x = torch.randn(n_images, shape.in_channels, *rows, device=device, dtype=kind)
    weight = torch.randn(
        shape.out_channels, shape.in_channels // shape.groups, *shape.kernel, device=device
    )
    x, weight = x.to(memory_format=memory_format), weight.to(kind, memory_format=memory_format)
    ones = [1] * len(sides)
    geometry = (list(shape.stride), padding, ones, False, [0] * len(sides), shape.groups)

    def forward() -> Tensor:
        result: Tensor = _aten.convolution(x, weight, None, *geometry)
        return result

    dy = torch.randn_like(forward())

    def backward() -> None:
        wanted = [has_source_gradient, True, False]
        _aten.convolution_backward(dy, x, weight, None, *geometry, wanted)

    flops = _flops(shape)
    yield ConvolutionSample(dtype, "forward", shape, flops, median_s(forward, device))
    twice = 2.0 if has_source_gradient else 1.0
    yield ConvolutionSample(dtype, "backward", shape, twice * flops, median_s(backward, device))


def _time_passes(dtype: str, n_bytes: int, device: torch.device) -> Iterator[PassSample]:
    """Time each kind of pass on a map of `n_bytes`; its traffic is counted as a trace counts it."""
    kind = _TORCH_DTYPES[dtype]
    side = int((n_bytes / kind.itemsize / _CHANNELS) ** 0.5)
    x = torch.randn(1, _CHANNELS, side, side, device=device, dtype=kind)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randn_like(x)
    weight = torch.ones(_CHANNELS, device=device)
    bias = torch.zeros(_CHANNELS, device=device)
    mean, variance = bias.clone(), weight.clone()
    norm = (weight, bias, mean, variance, True, 0.1, 1e-5)
    _, saved_mean, saved_scale = _aten.native_batch_norm(x, *norm)
    norm_backward = (weight, mean, variance, saved_mean, saved_scale, True, 1e-5, [True] * 3)
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    small = x[:, :, : side // 2, : side // 2].contiguous(memory_format=torch.channels_last)
    one = x.nbytes
    other = torch.float32 if kind == torch.bfloat16 else torch.bfloat16
    moments = [torch.zeros_like(x) for _ in range(2)]
    passes: dict[str, tuple[Callable[[], Any], float]] = {
        "elementwise": (lambda: x + y, 3 * one),
        "in_place": (lambda: torch.relu_(x), 2 * one),
        "rectify_backward": (lambda: _aten.threshold_backward(y, x, 0), 3 * one),
        "norm": (lambda: _aten.native_batch_norm(x, *norm), 2 * one),
        "norm_backward": (lambda: _aten.native_batch_norm_backward(y, x, *norm_backward), 3 * one),
        "pool": (
            lambda: _aten.max_pool2d_with_indices(x, *geometry),
            one + one / 4 + 8 * x.numel() / 4,
        ),
        "upsample": (lambda: _aten.upsample_nearest2d(small, [side, side]), one + small.nbytes),
        "cast": (lambda: x.to(other), one + x.numel() * other.itemsize),
    }
    if kind == torch.float32:
        passes["update"] = (lambda: _adamw(x, y, moments), 7 * one)
    for name, (run, moved) in passes.items():
        yield PassSample(name, dtype, int(moved), median_s(run, device))


def _adamw(parameter: Tensor, gradient: Tensor, moments: list[Tensor]) -> None:
    step = torch.ones((), device=parameter.device)
    torch._fused_adamw_(
        [parameter],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        lr=1e-3,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def median_s(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a few runs of `run`, after one that is left out."""
    first_s = _seconds(run, device)
    if first_s > _LONG_S:
        return _seconds(run, device)
    return statistics.median(_seconds(run, device) for _ in range(_N_TIMES))


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _matrix_rate(dtype: str, device: torch.device, *, is_native: bool) -> float:
    side = 8192 if device.type == "cuda" else 1536 if is_native else 192
    a = torch.randn(side, side, device=device).to(_TORCH_DTYPES[dtype])
    return float(2 * side**3 / median_s(lambda: a @ a, device))


def _launch_s(device: torch.device) -> float:
    """Return what an operation costs beside its work, in a network whose maps are of no size.

    Python, the dispatcher, autograd, and where there is no GPU the library's own set-up and the
    start of its threads.
    """
    blocks = []
    for _ in range(_N_BLOCKS):
        convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(_CHANNELS), nn.ReLU(inplace=True)]
    model = nn.Sequential(*blocks).to(device).to(memory_format=torch.channels_last)
    x = torch.ones(1, _CHANNELS, _SMALL_PX, _SMALL_PX, device=device)
    x = x.to(memory_format=torch.channels_last)

    def run() -> None:
        torch.autograd.backward(model(x).sum())

    n_operations = 2 * len(blocks)
    return median_s(run, device) / n_operations


@dataclass(frozen=True)
class _Memory:
    device_bytes: int
    host_bytes: int
    bytes_per_s: float
    first_touch_s_per_byte: float


def _measure_memory(device: torch.device) -> _Memory:
    x = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bytes_per_s = 2 * _PROBE_BYTES / median_s(lambda: y.copy_(x), device)
    host_bytes = psutil.virtual_memory().total
    if device.type == "cuda":
        return _Memory(torch.cuda.mem_get_info()[1], host_bytes, bytes_per_s, 0.0)
    filled_s = median_s(lambda: y.fill_(1), device)
    fresh_s = statistics.median(_fresh_fill_s() for _ in range(_N_TIMES))
    touch_s = max(0.0, fresh_s - filled_s) / _PROBE_BYTES
    return _Memory(host_bytes, host_bytes, bytes_per_s, touch_s)


def _fresh_fill_s() -> float:
    """Return the seconds of filling memory that no one has touched."""
    fresh = torch.empty(_PROBE_BYTES + 2**30, dtype=torch.uint8)[:_PROBE_BYTES]
    start_s = time.perf_counter()
    fresh.fill_(1)
    return time.perf_counter() - start_s


def _link_of_gpu(device: torch.device) -> tuple[float, float]:
    pinned = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    x = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
    out_s = median_s(lambda: pinned.copy_(x, non_blocking=True), device)
    in_s = median_s(lambda: x.copy_(pinned, non_blocking=True), device)
    return _PROBE_BYTES / out_s, _PROBE_BYTES / in_s


def _spill_disk(folder: Path | None) -> tuple[float, float]:
    """Return bytes/s of putting out to the spill file and getting back, as a strategy does it.

    Without a hard limit of memory the page cache keeps what was put out, so both are copies.
    """
    data, back = bytearray(b"1") * _PROBE_BYTES, bytearray(_PROBE_BYTES)
    with tempfile.TemporaryFile(dir=folder or tempfile.gettempdir(), buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, _PROBE_BYTES)

        def put_out() -> None:
            os.pwritev(file.fileno(), [data], 0)

        def get_back() -> None:
            os.preadv(file.fileno(), [back], 0)

        here = torch.device("cpu")
        return _PROBE_BYTES / median_s(put_out, here), _PROBE_BYTES / median_s(get_back, here)


def migration_of(kind: str, device_title: str, device_bytes: int) -> Migration:
    """Return how pages come on demand, which is not measured: of a GPU, as on the nearest one."""
    if kind == "cuda":
        return nearest_gpu(device_title, device_bytes).migration
    return Migration(_READ_AHEAD_BYTES, 1, _FAULT_S)
