"""Heatmaps to keypoints and back, and the loss between them.

Frames. Keypoints are (x, y) in the network's input image, with pixel centres at integers. A
heatmap of stride s covers the same area as the image, so that its pixel i is centred on
`s * (i + 0.5) - 0.5` of the image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIGMA_PX = 2.0

_PEAK_SIDE_PX = 5
_WINDOW_RADIUS_PX = 6


def decode(heatmaps: Tensor, stride: int) -> Tensor:
    """Return where the heatmaps point, finer than a pixel: (N, K, H, W) logits to (N, K, 2) xy.

    The result is float32, in pixels of the network's input. It is the mean position under a
    softmax of the logits within 6 heatmap pixels of the peak (3 standard deviations of a target):
    a second, weaker peak elsewhere does not pull on it. The peak is the 5×5 patch of most
    probability, so a lone bright pixel is none. Differentiable with respect to the logits.

    The soft-argmax over a whole heatmap is Nibali et al., "Numerical Coordinate Regression with
    Convolutional Neural Networks", arXiv:1801.07372 (DSNT); the window is ours. Within 6 heatmap
    pixels of the border the window is cut, and the mean lies inward of the peak's centre.
    """
    logits = heatmaps.float()
    peak_x, peak_y = _peaks(logits.detach())
    near_x = _near(logits.shape[-1], peak_x)
    near_y = _near(logits.shape[-2], peak_y)
    in_window = near_y[..., :, None] & near_x[..., None, :]
    probability = _spatial_softmax(logits.masked_fill(~in_window, -torch.inf))
    return _image_frame(_mean_position(probability), stride)


def target_heatmaps(
    keypoints: Tensor, shape: tuple[int, int], stride: int, sigma_px: float = SIGMA_PX
) -> Tensor:
    """Return a Gaussian around each keypoint: (N, K, 2) xy to (N, K, *shape), each of sum 1.

    `keypoints` are in pixels of the network's input, `shape` (rows, columns) and the standard
    deviation `sigma_px` in pixels of the heatmap. Float32.
    """
    centres = (keypoints.float() + 0.5) / stride - 0.5
    along_x = _gaussian(centres[..., 0], shape[1], sigma_px)
    along_y = _gaussian(centres[..., 1], shape[0], sigma_px)
    return along_y[..., :, None] * along_x[..., None, :]


class KeypointLoss(nn.Module):
    """How far heatmaps, softmaxed over their pixels, diverge from Gaussians on the keypoints.

    `forward(heatmaps, keypoints)` takes (N, K, H, W) logits and (N, K, 2) xy in pixels of the
    network's input and returns a float32 scalar: the Kullback-Leibler divergence of the softmax
    from the Gaussian, in nats per keypoint, 0 at best. One softmax over all pixels
    makes every pixel compete, so that a few images suffice to find the place from scratch; a
    per-pixel loss would be all but satisfied with empty heatmaps. Keypoints outside the image (an
    augmentation can move them there) are left out; with none inside, the loss is 0.
    """

    def __init__(self, stride: int, sigma_px: float = SIGMA_PX) -> None:
        super().__init__()
        self.stride = stride
        self.sigma_px = sigma_px

    def forward(self, heatmaps: Tensor, keypoints: Tensor) -> Tensor:
        """Return the mean divergence over the keypoints that are inside the image."""
        rows, columns = heatmaps.shape[-2:]
        target = target_heatmaps(keypoints, (rows, columns), self.stride, self.sigma_px).flatten(2)
        log_probability = F.log_softmax(heatmaps.float().flatten(2), dim=-1)
        divergence = F.kl_div(log_probability, target, reduction="none").sum(dim=-1)
        image_size = keypoints.new_tensor([columns, rows]) * self.stride
        inside = ((keypoints >= -0.5) & (keypoints <= image_size - 0.5)).all(dim=-1)
        return (divergence * inside).sum() / inside.sum().clamp(min=1)


def _peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    mass = F.avg_pool2d(
        _spatial_softmax(logits), _PEAK_SIDE_PX, stride=1, padding=_PEAK_SIDE_PX // 2
    )
    flat_index = mass.flatten(2).argmax(dim=-1)
    n_columns = logits.shape[-1]
    return flat_index % n_columns, flat_index // n_columns


def _near(n_pixels: int, peak: Tensor) -> Tensor:
    position = torch.arange(n_pixels, device=peak.device)
    return (position - peak[..., None]).abs() <= _WINDOW_RADIUS_PX


def _spatial_softmax(logits: Tensor) -> Tensor:
    return logits.flatten(2).softmax(dim=-1).view(logits.shape)


def _mean_position(probability: Tensor) -> Tensor:
    rows, columns = probability.shape[-2:]
    x = torch.arange(columns, dtype=probability.dtype, device=probability.device)
    y = torch.arange(rows, dtype=probability.dtype, device=probability.device)
    # No matrix product: autocast would round the positions to bf16, 2 pixels in 256.
    mean_x = (probability.sum(dim=-2) * x).sum(dim=-1)
    mean_y = (probability.sum(dim=-1) * y).sum(dim=-1)
    return torch.stack([mean_x, mean_y], dim=-1)


def _image_frame(heatmap_xy: Tensor, stride: int) -> Tensor:
    return stride * (heatmap_xy + 0.5) - 0.5


def _gaussian(centre: Tensor, n_pixels: int, sigma_px: float) -> Tensor:
    position = torch.arange(n_pixels, dtype=centre.dtype, device=centre.device)
    # A softmax and not exp: a centre far outside still gives a distribution, not 0 / 0.
    return (-0.5 * ((position - centre[..., None]) / sigma_px) ** 2).softmax(dim=-1)
