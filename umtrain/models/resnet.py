"""ResNet-18, ResNet-50 and ResNet-101 for whole-image classification, from torchvision."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from umtrain.errors import ConfigError
from umtrain.models.norm import NormLayer

HEAD = "fc"
TOTAL_STRIDE = 32

# Where the last feature map lies on the image: position i is centred on pixel 32 * i, that is on
# 32 * i + 0.5 where a pixel covers [i, i + 1). Paddings are symmetric, so each stride starts at 0.
FEATURE_STRIDE_PX = 32
FIRST_FEATURE_PX = 0.5

_DEFAULT_POOL = "avgmax"


_AVERAGE: dict[int, type[nn.Module]] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_MAXIMUM: dict[int, type[nn.Module]] = {2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}


class AverageAndMax(nn.Module):
    """Half the global average and half the global maximum: (N, C, H, W) to (N, C, 1, 1).

    With `n_dims` 3 of volumes, (N, C, D, H, W) to (N, C, 1, 1, 1).
    """

    def __init__(self, n_dims: int = 2) -> None:
        super().__init__()
        self.average = _AVERAGE[n_dims](1)
        self.maximum = _MAXIMUM[n_dims](1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of both."""
        pooled: Tensor = 0.5 * (self.average(x) + self.maximum(x))
        return pooled


_POOLS: dict[str, Callable[[int], nn.Module]] = {
    "avg": lambda n_dims: _AVERAGE[n_dims](1),
    "max": lambda n_dims: _MAXIMUM[n_dims](1),
    "avgmax": AverageAndMax,
}


def create_pool(name: str | None, n_dims: int = 2) -> nn.Module:
    """Return the global pooling that `model.pool=name` stands for, "avgmax" if None.

    Raises ConfigError for an unknown name.
    """
    name = _DEFAULT_POOL if name is None else name
    if name not in _POOLS:
        raise ConfigError(f"model.pool={name} is unknown; choose one of {', '.join(_POOLS)}")
    return _POOLS[name](n_dims)


def resnet50(
    in_channels: int, n_outputs: int, norm: NormLayer, pool: str | None = None
) -> nn.Module:
    """Return a ResNet-50: (N, in_channels, H, W) floats to (N, n_outputs) logits.

    `pool` is "avg", "max" or "avgmax", half of each (used if None): what reduces the last feature
    map, 1/32 of the image's side, to one vector. A finding of a few cells fills a few of its
    positions. The maximum keeps them as they are, whatever the size of the slide, but only one
    position per channel learns from a step; the average teaches all of them, but divides the
    finding by their number. Whole-slide networks with average or maximum in this place are
    described in Chen et al., "An annotation-free whole-slide training approach to pathological
    classification of lung cancer types using deep learning", Nat Commun 2021; 12:1193.

    Modules have torchvision's names, so its weights load. The last normalisation of each residual
    branch starts at zero (Goyal et al., arXiv:1706.02677).
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

    Raises ConfigError for an unknown `pool`.
    """
    return _resnet(Bottleneck, (3, 4, 6, 3), in_channels, n_outputs, norm, pool)


def resnet101(
    in_channels: int, n_outputs: int, norm: NormLayer, pool: str | None = None
) -> nn.Module:
    """Return a ResNet-101; all else is as in `resnet50`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), in_channels, n_outputs, norm, pool)


def resnet18(
    in_channels: int, n_outputs: int, norm: NormLayer, pool: str | None = None
) -> nn.Module:
    """Return a ResNet-18, of basic blocks; all else is as in `resnet50`."""
    return _resnet(BasicBlock, (2, 2, 2, 2), in_channels, n_outputs, norm, pool)


def split_classifier(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a ResNet of this module as (backbone, head), which share its layers.

    `backbone(x)` is the last feature map (N, C, H / 32, W / 32), `head(backbone(x))` is `model(x)`.
    Both are in the mode that the model is in.
    """
    layers = dict(model.named_children())
    pool, linear = layers.pop("avgpool"), layers.pop(HEAD)
    backbone, head = nn.Sequential(OrderedDict(layers)), nn.Sequential(pool, nn.Flatten(), linear)
    # Not train(): it would change the layers, of which frozen norms have a mode of their own.
    backbone.training = head.training = model.training
    return backbone, head


def _resnet(
    block: type[BasicBlock | Bottleneck],
    n_blocks: Sequence[int],
    in_channels: int,
    n_outputs: int,
    norm: NormLayer,
    pool: str | None,
) -> nn.Module:
    model: nn.Module = ResNet(
        block,
        list(n_blocks),
        num_classes=n_outputs,
        zero_init_residual=True,
        norm_layer=norm,
    )
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    # torchvision's forward calls the pooling by this name, whichever it is.
    model.avgpool = create_pool(pool)
    return model
