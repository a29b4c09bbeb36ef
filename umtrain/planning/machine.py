"""The machine that a step is about to run on: its profile, with what is free of it now."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from umtrain.memory.allocator import has_page_pool
from umtrain.memory.available import available_bytes
from umtrain.memory.options import Options
from umtrain.memory.tensors import model_bytes
from umtrain.planning.calibration import local_profile
from umtrain.planning.profile import Profile


def free_profile(options: Options, model: nn.Module | None = None) -> Profile:
    """Return this machine's profile with the device and host memory that are free now.

    What `model` holds already counts as free: it is part of what a step is predicted to need. What
    readers will take does not.
    Host memory is RAM beside a GPU, and without one the disk of the spill file.
    """
    ram_bytes = max(0, available_bytes() - options.readers_bytes)
    if options.device == "cuda":
        device_bytes, host_bytes = int(torch.cuda.mem_get_info()[0]), ram_bytes
    else:
        device_bytes, host_bytes = ram_bytes, _free_disk_bytes(options.spill_dir)
    device_bytes += 0 if model is None else model_bytes(model)
    return dataclasses.replace(
        local_profile(options.device),
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        has_page_pool=has_page_pool(),
    )


def _free_disk_bytes(spill_dir: Path | None) -> int:
    """Return what the disk of a spill file has free; of a folder that is missing, its parents'.

    Whether a file can be made there is for the one to say who makes it.
    """
    folder = Path(tempfile.gettempdir() if spill_dir is None else spill_dir).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
