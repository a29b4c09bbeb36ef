"""The networks: plain modules, which know nothing of memory.

# Note: [One column in bf16]
With torch 2.15 (oneDNN 3.13) on a processor with AVX512-BF16 or AMX, a convolution of stride 2, of
3×3 or 7×7, whose output has one column reads memory that no one wrote: in its forward pass, in
its weights' gradient, or in both, by the input's size. So on processors an input needs more
columns than the network's total stride.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from umtrain.errors import ConfigError
from umtrain.models import resnet, resnet3d, resunet35
from umtrain.models.norm import NormLayer, norm_layer
from umtrain.models.pretrained import load_pretrained


@dataclass(frozen=True)
class _Entry:
    build: Callable[[int, int, NormLayer, str | None], nn.Module]
    head: str
    total_stride: int
    n_dims: int = 2


def _resunet35(in_channels: int, n_outputs: int, norm: NormLayer, pool: str | None) -> nn.Module:
    if pool is not None:
        raise ConfigError(f"model.pool={pool}: resunet35 has no global pooling; leave it out")
    return resunet35.ResUNet35(in_channels, n_outputs, norm)


_REGISTRY = {
    "resnet18": _Entry(resnet.resnet18, resnet.HEAD, resnet.TOTAL_STRIDE),
    "resnet50": _Entry(resnet.resnet50, resnet.HEAD, resnet.TOTAL_STRIDE),
    "resnet101": _Entry(resnet.resnet101, resnet.HEAD, resnet.TOTAL_STRIDE),
    "resnet18_3d": _Entry(resnet3d.resnet18_3d, resnet3d.HEAD, resnet3d.TOTAL_STRIDE, n_dims=3),
    "resnet101_3d": _Entry(resnet3d.resnet101_3d, resnet3d.HEAD, resnet3d.TOTAL_STRIDE, n_dims=3),
    "resunet35": _Entry(_resunet35, resunet35.HEAD, resunet35.SIZE_MULTIPLE),
}


def create(
    name: str,
    *,
    in_channels: int,
    n_outputs: int,
    norm: str = "batch",
    pool: str | None = None,
    pretrained: Path | None = None,
) -> nn.Module:
    """Return the model `name`, in float32, on the CPU, in training mode.

    `resnet18`, `resnet50` and `resnet101` give (N, n_outputs) logits, and so do `resnet18_3d` and
    `resnet101_3d`, of volumes (N, in_channels, D, H, W); `resunet35` gives (N, n_outputs, H/2,
    W/2) heatmaps. `norm` is "batch", "frozen" or "group" (see `umtrain.models.norm`), `pool` the
    global pooling of a classifier, "avg", "max" or "avgmax" (None: the model's own), `pretrained`
    a file of weights (see `umtrain.models.pretrained`).

    Raises ConfigError for an unknown name or option, and for a file that does not fit.
    """
    entry = _entry(name)
    model = entry.build(in_channels, n_outputs, norm_layer(norm, entry.n_dims), pool)
    if pretrained is not None:
        load_pretrained(model, pretrained, entry.head)
    return model


def total_stride(name: str) -> int:
    """Return how many columns of the input one column of the network's smallest map stands for.

    Raises ConfigError for an unknown name.
    """
    return _entry(name).total_stride


def _entry(name: str) -> _Entry:
    if name not in _REGISTRY:
        raise ConfigError(f"model={name} is unknown; choose one of {', '.join(_REGISTRY)}")
    return _REGISTRY[name]
