"""Normalisation layers, and which statistics evaluation uses.

# Note: [Batch size 1]
In training, batch normalisation normalises with the statistics of the batch; in evaluation with
running averages of them. With many images in a batch the two are nearly the same. With one image
they are not: every image was trained on with its own statistics, and its blackening, stain or
share of background makes them unlike the average. Such a model trains well and evaluates badly.
Seen on radiographs: of 160 training films one, with a wide white border on all four sides, had its
sacrum placed more than half of its 512 rows off by running statistics, at batch sizes 1, 2 and 4
alike, and within 4 pixels by its own.

Three ways to make training and evaluation agree, chosen by `model.norm`:

- `batch` (the default): `BatchNorm2d` below. Evaluation of a model that is trained at batch size 1
  should ask for `set_eval_statistics(model, "image")`: each image is then normalised with its own
  statistics, by the same kernel as in training. It needs no pretrained weights, adds no cost, and
  checkpoints stay those of ordinary batch normalisation. At larger batches use "running".
- `frozen`: `FrozenNorm`. The running statistics of pretrained weights, in both modes.
- `group`: `torch.nn.GroupNorm`, which never looks beyond one image (Wu & He, "Group
  Normalization", ECCV 2018).
"""

from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umtrain.errors import ConfigError
from umtrain.exchange import Exchange
from umtrain.models.joint_norm import joint_batch_norm

EvalStatistics = Literal["running", "image"]
NormLayer = Callable[[int], nn.Module]

_MAX_GROUPS = 32


class _OwnStatistics(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation whose evaluation can use each image's own statistics.

    In training it is torch's, and always updates the running statistics; its state dict is the
    same too. `eval_statistics` acts in evaluation only: "running" is the stock behaviour; "image"
    normalises every image by itself, so that a result does not depend on what else is in the
    batch, and at batch size 1 equals what training computes. See Note: [Batch size 1].

    Ioffe & Szegedy, "Batch Normalization", ICML 2015.
    """

    eval_statistics: EvalStatistics = "running"
    exchange: Exchange | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, with the statistics that the mode asks for."""
        if self.training and self.exchange is not None:
            return joint_batch_norm(self, x, self.exchange)
        if self.training or self.eval_statistics == "running":
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if len(x) == 1:
            return self._normalise_image(x)
        return torch.cat([self._normalise_image(image) for image in torch.split(x, 1)])

    def _normalise_image(self, image: Tensor) -> Tensor:
        return F.batch_norm(
            image, None, None, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps
        )


class BatchNorm2d(_OwnStatistics, nn.BatchNorm2d):
    """See `_OwnStatistics`. Input and output (N, C, H, W), any float dtype."""


class BatchNorm3d(_OwnStatistics, nn.BatchNorm3d):
    """See `_OwnStatistics`. Input and output (N, C, D, H, W), any float dtype."""


class FrozenNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation that stays in evaluation mode: statistics fixed, weight and bias trained.

    For pretrained weights, whose running statistics it keeps. The affine parameters do train:
    fixed statistics make them an ordinary per-channel scale and shift, which is what adapts a
    pretrained network to another stain or exposure. The state dict is that of torch's.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever `mode` is."""
        super().train(False)
        return self


class FrozenBatchNorm2d(FrozenNorm, nn.BatchNorm2d):
    """See `FrozenNorm`. Input and output (N, C, H, W)."""


class FrozenBatchNorm3d(FrozenNorm, nn.BatchNorm3d):
    """See `FrozenNorm`. Input and output (N, C, D, H, W)."""


def group_norm(num_features: int) -> nn.GroupNorm:
    """Return group normalisation in 32 groups, fewer where a group would have under 2 channels.

    A group of a single channel would be instance normalisation, which loses how strongly a channel
    responds to the image as a whole.
    """
    n_groups = min(_MAX_GROUPS, num_features // 2)
    return nn.GroupNorm(n_groups, num_features)


_NORM_LAYERS: dict[str, dict[int, NormLayer]] = {
    "batch": {2: BatchNorm2d, 3: BatchNorm3d},
    "frozen": {2: FrozenBatchNorm2d, 3: FrozenBatchNorm3d},
    "group": {2: group_norm, 3: group_norm},
}


def norm_layer(name: str, n_dims: int = 2) -> NormLayer:
    """Return the factory, from a number of channels to a layer, that `model.norm=name` stands for.

    The layer is for feature maps of `n_dims` dimensions: 2 for images, 3 for volumes.

    Raises ConfigError, listing the options, if there is none.
    """
    if name not in _NORM_LAYERS:
        raise ConfigError(f"model.norm={name} is unknown; choose one of {', '.join(_NORM_LAYERS)}")
    return _NORM_LAYERS[name][n_dims]


def set_eval_statistics(model: nn.Module, statistics: EvalStatistics) -> None:
    """Make every batch normalisation of `model` evaluate with "running" or with "image" statistics.

    Frozen and group normalisation have no such choice and are left as they are. The choice is not
    part of the state dict: set it again after building a model for a checkpoint.

    Raises ConfigError, listing the options, for any other `statistics`.
    """
    options = get_args(EvalStatistics)
    if statistics not in options:
        raise ConfigError(
            f"evaluation statistics {statistics!r} are unknown; choose one of {', '.join(options)}"
        )
    for module in model.modules():
        if isinstance(module, _OwnStatistics):
            module.eval_statistics = statistics


def join_statistics(model: nn.Module, exchange: Exchange | None) -> None:
    """Make every batch normalisation of `model` train on all ranks' statistics; None: its own.

    Like `set_eval_statistics`, it is no part of the state dict.
    """
    for module in model.modules():
        if isinstance(module, _OwnStatistics):
            module.exchange = exchange
