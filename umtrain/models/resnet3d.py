"""ResNet-18 and ResNet-101 for volumes, from MONAI.

MONAI is imported when a network is built: it takes seconds.
"""

from collections.abc import Callable

from torch import nn

from umtrain.models.norm import NormLayer
from umtrain.models.resnet import create_pool

HEAD = "fc"
TOTAL_STRIDE = 32

# Slices, rows and columns that a position of the last feature map stands for. Paddings are
# symmetric, so position i is centred on voxel i * stride.
FEATURE_STRIDE_VOXELS = (16, 32, 32)

# Slices of CT are thicker than their pixels are wide: the first convolution halves rows and columns
# only (Hara et al., CVPR 2018, do the same with frames of a film).
_STEM_STRIDE = (1, 2, 2)


def resnet18_3d(
    in_channels: int, n_outputs: int, norm: NormLayer, pool: str | None = None
) -> nn.Module:
    """Return a ResNet-18 of basic blocks; all else is as in `resnet101_3d`."""
    from monai.networks.nets.resnet import resnet18

    return _adapted(resnet18, in_channels, n_outputs, norm, pool)


def resnet101_3d(
    in_channels: int, n_outputs: int, norm: NormLayer, pool: str | None = None
) -> nn.Module:
    """Return a 3D ResNet-101: (N, in_channels, D, H, W) floats to (N, n_outputs) logits.

    `pool` is "avg", "max" or "avgmax", half of each (used if None), as in `models.resnet`. The last
    normalisation of each residual branch starts at zero. Modules have MONAI's names, which are
    those of MedicalNet's weights (Chen et al., arXiv:1904.00625).
    Hara et al., "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?", CVPR
    2018.

    Raises ConfigError for an unknown `pool`.
    """
    from monai.networks.nets.resnet import resnet101

    return _adapted(resnet101, in_channels, n_outputs, norm, pool)


def _adapted(
    build: Callable[..., nn.Module],
    in_channels: int,
    n_outputs: int,
    norm: NormLayer,
    pool: str | None,
) -> nn.Module:
    """Return MONAI's network with our norms and pooling in the place of its own."""
    model = build(
        spatial_dims=3,
        n_input_channels=in_channels,
        num_classes=n_outputs,
        conv1_t_stride=_STEM_STRIDE,
        bias_downsample=False,  # a normalisation follows
    )
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm3d):
                setattr(parent, name, norm(child.num_features))
    _start_branches_at_zero(model)
    model.avgpool = create_pool(pool, n_dims=3)
    return model


def _start_branches_at_zero(model: nn.Module) -> None:
    """Make each residual block the identity at first (Goyal et al., arXiv:1706.02677)."""
    from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck

    for module in model.modules():
        if isinstance(module, ResNetBlock | ResNetBottleneck):
            last = module.bn3 if isinstance(module, ResNetBottleneck) else module.bn2
            nn.init.zeros_(last.weight)
