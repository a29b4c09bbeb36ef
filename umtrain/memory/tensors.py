"""Small facts about tensors and models that several strategies need."""

from typing import Any

from torch import nn


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
