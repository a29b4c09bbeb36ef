"""ResUNet35: our residual U-Net for keypoints on radiographs, one heatmap for each.

It plays the part of the ResUNet of Weng et al., "Artificial Intelligence for Automatic Measurement
of Sagittal Vertical Axis Using ResUNet Framework", J Clin Med 2019; 8(11):1826, a convolutional
network that detects keypoints. The layout is our own: residual blocks down and up, joined by
skips, and a heatmap per keypoint.

The 35 counts the convolutions, shortcut projections included:

| part | | convolutions |
| --- | --- | ---: |
| stem | one 7×7 of stride 2 | 1 |
| encoder, stride 2 | one residual block of two 3×3; its shortcut is the identity | 2 |
| encoder, strides 4, 8, 16, 32, 64 | five blocks of two 3×3 and a 1×1 projection | 15 |
| decoder, strides 32, 16, 8, 4, 2 | five blocks of two 3×3 and a 1×1 projection | 15 |
| head | a 3×3, then a 1×1 to one heatmap per keypoint | 2 |
| | | **35** |

Heatmaps are at half resolution: full resolution would double memory and time, and decoding (see
`umtrain.models.heatmap`) is far finer than a pixel, so it would add nothing.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional

from umtrain.errors import ConfigError
from umtrain.models.norm import NormLayer

HEAD = "head.3"
HEATMAP_STRIDE = 2
SIZE_MULTIPLE = 64

_WIDTHS = (32, 64, 96, 128, 192, 256)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: (N, in_channels, H, W) to (N, width, H/s, W/s).

    The shortcut is a projection where stride or width change, else the identity.
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, width, 1, stride, bias=False), norm(width)
            )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch + shortcut)."""
        branch = self.relu1(self.norm1(self.conv1(x)))
        out: Tensor = self.relu2(self.norm2(self.conv2(branch)) + self.shortcut(x))
        return out


class NearestUpsample(nn.Upsample):
    """Twice as many rows and columns by nearest neighbour, in the dtype of its input.

    On a GPU autocast would have it compute, and all that is joined to it keep, in float32: twice
    the memory for values that are only copied. Streaming asks `keeps_dtype`, to know that this is
    torch's layer in all else.
    """

    keeps_dtype = True

    def __init__(self) -> None:
        super().__init__(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) as (N, C, 2H, 2W)."""
        return _enlarged(x, self)


def _enlarged(x: Tensor, upsample: nn.Upsample) -> Tensor:
    kind = x.device.type
    without = torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
    with without:
        return functional.interpolate(x, scale_factor=upsample.scale_factor)


# A tracer of torch.fx would follow it into what depends on the device.
torch.fx.wrap("_enlarged")


class ResUNet35(nn.Module):
    """Residual U-Net of 35 convolutions: (N, in_channels, H, W) to (N, n_outputs, H/2, W/2) logits.

    H and W must be multiples of `SIZE_MULTIPLE`. The output is unnormalised; a softmax over all
    pixels of a heatmap gives the probability that its keypoint is there. Upsampling is by nearest
    neighbour, followed by convolutions: on a GPU its gradient adds up in a fixed order, where that
    of PyTorch's bilinear kernel uses atomic additions and differs from run to run.

    Raises ConfigError for an image of another size. See the module for the layout and the paper.
    """

    def __init__(self, in_channels: int, n_outputs: int, norm: NormLayer) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, _WIDTHS[0], 7, HEATMAP_STRIDE, padding=3, bias=False),
            norm(_WIDTHS[0]),
            nn.ReLU(inplace=True),
        )
        strides = (1, 2, 2, 2, 2, 2)
        widths_in = (_WIDTHS[0], *_WIDTHS[:-1])
        self.encoder = nn.ModuleList(
            ResidualBlock(width_in, width, stride, norm)
            for width_in, width, stride in zip(widths_in, _WIDTHS, strides, strict=True)
        )
        self.upsample = nn.ModuleList(NearestUpsample() for _ in _WIDTHS[:-1])
        self.decoder = nn.ModuleList(
            ResidualBlock(below + width, width, 1, norm)
            for below, width in zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True)
        )
        self.head = nn.Sequential(
            nn.Conv2d(_WIDTHS[0], _WIDTHS[0], 3, padding=1, bias=False),
            norm(_WIDTHS[0]),
            nn.ReLU(inplace=True),
            nn.Conv2d(_WIDTHS[0], n_outputs, 1),
        )
        _initialise(self)
        # A hook and not a line of forward, where it would depend on data and stop torch.fx.
        self.register_forward_pre_hook(_check_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return one heatmap of logits per keypoint, at half the resolution of `x`."""
        x = self.stem(x)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        for upsample, block, skip in zip(self.upsample, self.decoder, skips[-2::-1], strict=True):
            x = block(torch.cat([upsample(x), skip], dim=1))
        heatmaps: Tensor = self.head(x)
        return heatmaps


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ResidualBlock):
            # Each block starts as its shortcut (Goyal et al., arXiv:1706.02677).
            last_scale = module.norm2.weight
            assert isinstance(last_scale, Tensor)
            nn.init.zeros_(last_scale)


def _check_size(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
    height, width = inputs[0].shape[-2:]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise ConfigError(
            f"resunet35 got an image of {height}×{width} pixels; height and width must be "
            f"multiples of {SIZE_MULTIPLE}: resize or pad it"
        )
