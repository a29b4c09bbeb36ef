"""What this machine has for training at full resolution; each finding says what to do about it."""

import importlib.util
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import openslide
import psutil
import torch
from pydicom.pixels import get_decoder
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from umtrain.compiler import c_compiler, cpp_compiler
from umtrain.device import cpu_has_bf16, device_name
from umtrain.errors import DeviceError
from umtrain.memory.page_pool import install_page_pool
from umtrain.units import format_bytes

_PROBE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, what was found, what to do (if anything)."""

    subject: str
    found: str
    advice: str = ""


def examine(spill_dir: Path | None = None) -> list[Finding]:
    """Look at the machine; takes a second or two for the disk."""
    folder = spill_dir or Path(tempfile.gettempdir())
    return [
        _processor(),
        _load(),
        _memory(),
        *_gpu(),
        *_compilers(),
        _spill_disk(folder),
        _openslide(),
        *(_codec(uid) for uid in (JPEGBaseline8Bit, JPEG2000Lossless, JPEGLSLossless, RLELossless)),
    ]


def _processor() -> Finding:
    n_cores = len(os.sched_getaffinity(0))
    found = f"{device_name(torch.device('cpu'))}, {n_cores} cores, "
    if not cpu_has_bf16():
        advice = "precision=auto takes fp32 here; bf16 would be slower"
        return Finding("processor", f"{found}no bf16 instructions", advice)
    return Finding("processor", f"{found}bf16 instructions")


def _load() -> Finding:
    n_cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    advice = ""
    if load > 0.5 * n_cores:
        advice = "others compute here: OMP_WAIT_POLICY=PASSIVE keeps torch's threads from spinning"
    return Finding("load", f"{load:.1f} on {n_cores} cores", advice)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"
    advice = "" if memory.available > 4 * 2**30 else "under 4 GiB: keep res at 1024 or below"
    return Finding("RAM", found, advice)


def _gpu() -> list[Finding]:
    if not torch.cuda.is_available():
        return [
            Finding(
                "GPU",
                "none that torch can use",
                "training runs on the CPU; for a GPU install its driver and a CUDA build of torch",
            )
        ]
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    name = device_name(torch.device("cuda"))
    bytes_text = f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} free"
    return [Finding("GPU", f"{name}, {bytes_text}"), _managed_memory()]


def _managed_memory() -> Finding:
    if importlib.util.find_spec("cupy") is None:
        return Finding(
            "managed memory", "cupy is not installed", "pip install 'umtrain[cuda]' for memory=um*"
        )
    from umtrain.memory.pool_cuda import require_concurrent_managed_access

    try:
        require_concurrent_managed_access()
    except DeviceError as error:
        return Finding("managed memory", str(error), "memory=um* is refused here; use memory=lms")
    return Finding("managed memory", "concurrent managed access")


def _compilers() -> list[Finding]:
    findings = []
    found = c_compiler()
    advice = "" if found else "memory=stream runs slower on the processor without one: install cc"
    findings.append(Finding("C compiler", found or "none", advice))
    found = cpp_compiler()
    if found is not None and install_page_pool() is None:
        found = f"{found}, but it does not make the page pool"
    lacks = found is None or " but " in found
    advice = "training on the processor takes more memory: install a c++ of C++20" if lacks else ""
    findings.append(Finding("C++ compiler", found or "none", advice))
    return findings


def _spill_disk(folder: Path) -> Finding:
    free_bytes = psutil.disk_usage(str(folder)).free
    if free_bytes < 2 * _PROBE_BYTES:
        return Finding(
            "spill disk",
            f"{folder}: {format_bytes(free_bytes)} free",
            "too full to swap to; set memory.spill_dir to a larger disk",
        )
    write_rate, read_rate = _disk_rates(folder)
    found = (
        f"{folder}: {format_bytes(free_bytes)} free, writes {format_bytes(write_rate)}/s, "
        f"reads {format_bytes(read_rate)}/s"
    )
    slow = min(write_rate, read_rate) < 200 * 2**20
    return Finding("spill disk", found, "slow: set memory.spill_dir to an SSD" if slow else "")


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Return bytes/s of writing to and reading back from `folder`, past the page cache."""
    block = os.urandom(2**20) * 16
    n_blocks = _PROBE_BYTES // len(block)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start_s = time.perf_counter()
        for _ in range(n_blocks):
            file.write(block)
        os.fdatasync(file.fileno())
        write_s = time.perf_counter() - start_s
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start_s = time.perf_counter()
        for _ in range(n_blocks):
            file.read(len(block))
        read_s = time.perf_counter() - start_s
    return _PROBE_BYTES / write_s, _PROBE_BYTES / read_s


def _openslide() -> Finding:
    version = openslide.__library_version__
    if tuple(int(part) for part in version.split(".")[:3]) < (4, 0, 1):
        return Finding("OpenSlide", version, "too old: pip install -U openslide-bin")
    return Finding("OpenSlide", version)


def _codec(uid: UID) -> Finding:
    decoder = get_decoder(uid)
    if decoder.is_available:
        return Finding(f"DICOM {uid.name}", "can be decoded")
    needs = "; ".join(decoder.missing_dependencies)
    return Finding(f"DICOM {uid.name}", "cannot be decoded", f"install {needs}")
