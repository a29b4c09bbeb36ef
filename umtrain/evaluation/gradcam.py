"""Grad-CAM: which positions of the last feature map raise the logit of the positive class."""

from collections.abc import Callable

import torch
from torch import Tensor


def grad_cam(features: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Return how much each position of `features` speaks for the positive class.

    `features` (n, C, h, w), or (n, C, d, h, w) of volumes, is the last feature map, `head` what
    makes one logit an image of it, (n, 1): pooling and a linear layer, each image by itself.
    Returns (n, h, w) or (n, d, h, w), float32 or wider: the sum of the channels, each weighted by
    the spatial mean of the logit's gradient with respect to it, and 0 where that is negative. Call
    it under the autocast of the evaluation. Only `head` is differentiated, so it takes as much
    memory again as two feature maps.

    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based
    Localization", ICCV 2017. Raises ValueError if `head` returns another shape.
    """
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(leaf)
        if logits.shape != (len(features), 1):
            raise ValueError(
                f"the head must return ({len(features)}, 1) logits; got {tuple(logits.shape)}"
            )
        (gradient,) = torch.autograd.grad(logits.sum(), leaf)
    dtype = torch.promote_types(features.dtype, torch.float32)
    weights = gradient.mean(tuple(range(2, gradient.ndim)), dtype=dtype)
    del gradient
    # Row by row (slice by slice): no second copy of the whole map in a wider dtype.
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        rows = [
            torch.einsum("nc...,nc->n...", features[:, :, row].to(dtype), weights)
            for row in range(features.shape[2])
        ]
        return torch.stack(rows, dim=1).relu_()
