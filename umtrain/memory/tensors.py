"""Small facts about tensors and models that several strategies need."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def batch_arguments(sample_batch: Any) -> tuple[Any, ...]:
    """Return a sample batch as the positional arguments of the model."""
    return sample_batch if isinstance(sample_batch, tuple) else (sample_batch,)


def model_storages(model: nn.Module) -> dict[int, int]:
    """Return the bytes of each storage of a model's parameters and buffers, by its address."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    return sum(model_storages(model).values())


def planned_device(model: nn.Module) -> torch.device:
    """Return the device that a model is planned for: its own, the CPU if it is on "meta"."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    """Return a fake tensor on `device` that is like `tensor`, which may be on "meta"."""
    with mode:
        fake = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )
    return fake.requires_grad_(tensor.requires_grad)


def fake_state(
    model: nn.Module, mode: FakeTensorMode, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return fake parameters and buffers by name, for `torch.func.functional_call`."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: fake_like(tensor, mode, device) for name, tensor in named}
