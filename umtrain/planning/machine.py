"""The machine that a step is about to run on: its profile, with what is free of it now."""

import dataclasses
import shutil
import tempfile

import torch
from torch import nn

from umtrain.memory.available import available_bytes
from umtrain.memory.options import Options
from umtrain.memory.tensors import model_bytes
from umtrain.planning.calibration import local_profile
from umtrain.planning.profile import Profile


def free_profile(options: Options, model: nn.Module | None = None) -> Profile:
    """Return this machine's profile with the device and host memory that are free now.

    What `model` holds already counts as free: it is part of what a step is predicted to need.
    Host memory is RAM beside a GPU, and without one the disk of the spill file.
    """
    if options.device == "cuda":
        device_bytes, host_bytes = int(torch.cuda.mem_get_info()[0]), available_bytes()
    else:
        folder = options.spill_dir or tempfile.gettempdir()
        device_bytes, host_bytes = available_bytes(), shutil.disk_usage(folder).free
    device_bytes += 0 if model is None else model_bytes(model)
    profile = local_profile(options.device)
    return dataclasses.replace(profile, device_bytes=device_bytes, host_bytes=host_bytes)
