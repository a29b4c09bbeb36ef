"""Loading weights from a file into a model that need not match them in every layer."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from umtrain.errors import ConfigError
from umtrain.models.norm import FrozenNorm

_log = logging.getLogger(__name__)

_PREFIXES = ("module.", "model.", "backbone.")
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_N_KEYS_SHOWN = 4


@dataclass(frozen=True)
class PretrainedReport:
    """Which keys of a model came from a file (`matched`), and which of either had no partner.

    `missing` are the model's keys that keep their initial values, `unexpected` the file's keys
    that were not used; a head whose shape differs is in both.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} tensors loaded; "
            f"{len(self.missing)} of the model not in the file{_in_parentheses(self.missing)}; "
            f"{len(self.unexpected)} of the file not used{_in_parentheses(self.unexpected)}"
        )


def load_pretrained(model: nn.Module, path: Path, head: str) -> PretrainedReport:
    """Copy the weights in `path` into `model`, key by key, and report what matched.

    The file is one of `torch.save`, read with `weights_only=True`: a state dict, or a dict with
    one under "state_dict", "model_state_dict" or "model". Prefixes "module.", "model." and
    "backbone." are taken off. The layer named `head` is left as initialised if its shape differs.
    A first convolution for another number of channels is adapted: to one channel by the sum over
    the file's (a grey image then excites it as it did in three equal channels), from one channel
    by its even share.

    Raises ConfigError if the file cannot be read, if nothing matches, if a tensor other than the
    head has another shape, if the file has more blocks in a stage than the model, or if
    `model.norm=frozen` finds no running statistics in it.
    """
    found = _read(path)
    expected = model.state_dict()
    usable = {
        key: _adapted(tensor, expected[key], key, path)
        for key, tensor in found.items()
        if key in expected and not _is_other_head(key, head, tensor, expected[key])
    }
    # Counters alone are no weights: they are in every batch-normalised network.
    if not any(not key.endswith("num_batches_tracked") for key in usable):
        raise ConfigError(
            f"model.pretrained={path}: none of its weights belong to this model; "
            f"expected keys such as {_listed(expected)}; found {_listed(found)}; "
            "choose the model that the file was made with"
        )
    _check_no_further_blocks(model, found, path)
    _check_frozen_statistics(model, usable, path)
    model.load_state_dict(usable, strict=False)
    report = PretrainedReport(
        matched=tuple(usable),
        missing=tuple(key for key in expected if key not in usable),
        unexpected=tuple(key for key in found if key not in usable),
    )
    _log.info("%s: %s", path, report)
    return report


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"model.pretrained={path}: there is no such file") from None
    except Exception as error:  # a damaged file fails in whichever part of torch meets it first
        raise ConfigError(
            f"model.pretrained={path} cannot be read as weights; expected a state dict of tensors "
            "saved with torch.save(model.state_dict(), path)"
        ) from error
    tensors = {
        _without_prefixes(key): value
        for key, value in _state_dict(content).items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise ConfigError(
            f"model.pretrained={path} holds no tensors; expected a state dict, by itself or under "
            f"one of the keys {', '.join(_CONTAINERS)}"
        )
    return tensors


def _state_dict(content: object) -> Mapping[object, object]:
    if not isinstance(content, Mapping):
        return {}
    for name in _CONTAINERS:
        if isinstance(content.get(name), Mapping):
            return _state_dict(content[name])
    return content


def _without_prefixes(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", maxsplit=1)[1]
    return key


def _is_other_head(key: str, head: str, tensor: Tensor, expected: Tensor) -> bool:
    return key.startswith(f"{head}.") and tensor.shape != expected.shape


def _adapted(tensor: Tensor, expected: Tensor, key: str, path: Path) -> Tensor:
    if tensor.shape == expected.shape:
        return tensor
    same_but_channels = (
        tensor.ndim == expected.ndim >= 4
        and tensor.shape[0] == expected.shape[0]
        and tensor.shape[2:] == expected.shape[2:]
    )
    if same_but_channels and expected.shape[1] == 1:
        return tensor.sum(dim=1, keepdim=True)
    if same_but_channels and tensor.shape[1] == 1:
        return tensor.expand_as(expected) / expected.shape[1]
    raise ConfigError(
        f"model.pretrained={path}: {key} has shape {tuple(tensor.shape)}, expected "
        f"{tuple(expected.shape)}; choose the model that the file was made with"
    )


def _check_no_further_blocks(model: nn.Module, found: Iterable[str], path: Path) -> None:
    """Refuse the weights of a deeper network of the kind, of which all that is here would fit."""
    stages = {name: m for name, m in model.named_modules() if isinstance(m, nn.Sequential) and name}
    for key in found:
        for name, stage in stages.items():
            inside = key.removeprefix(f"{name}.")
            number = inside.partition(".")[0]
            if inside != key and number.isdigit() and int(number) >= len(stage):
                raise ConfigError(
                    f"model.pretrained={path}: has {key}, and {name} of the model ends before it; "
                    "choose the model that the file was made with"
                )


def _check_frozen_statistics(model: nn.Module, usable: Mapping[str, Tensor], path: Path) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FrozenNorm) and f"{name}.running_mean" not in usable:
            raise ConfigError(
                f"model.pretrained={path} has no running statistics for {name}, which "
                "model.norm=frozen needs; choose weights trained with batch normalisation, or "
                "model.norm=batch"
            )


def _listed(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:_N_KEYS_SHOWN]) + (", …" if len(names) > _N_KEYS_SHOWN else "")


def _in_parentheses(keys: tuple[str, ...]) -> str:
    return f" ({_listed(keys)})" if keys else ""
