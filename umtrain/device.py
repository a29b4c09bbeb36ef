"""What this machine can compute with: resolves device=auto."""

import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from umtrain.errors import DeviceError


def resolve_device(choice: str) -> torch.device:
    """Return the device that `choice` (auto, cpu, cuda) stands for here.

    Raises DeviceError if a GPU is asked for and none can be used.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device=cuda: torch finds no usable GPU; use device=cpu, or see `umtrain doctor`"
        )
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def has_bf16(device: torch.device) -> bool:
    """Tell whether `device` computes in bf16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Tell whether this CPU has bf16 dot products (AVX512-BF16 or AMX), by its own flags."""
    flags = _cpu_info("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


# How the errors of CUDA and its libraries begin, as torch reports them.
_FAILURES = ("CUDA error", "CUDA driver error", "cuDNN error", "cuBLAS error", "NCCL error")


@contextmanager
def naming_device_failures() -> Generator[None]:
    """Turn what torch says when a GPU has failed, or has gone, into DeviceError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, torch.AcceleratorError) or text.startswith(_FAILURES)):
            raise
        raise DeviceError(
            f"the GPU failed ({text.splitlines()[0] if text else 'no reason given'}); see "
            "`nvidia-smi` and the system's log, then start the run again: it goes on from its "
            "last checkpoint"
        ) from error


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(field: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
