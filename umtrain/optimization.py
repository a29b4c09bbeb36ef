"""The optimizer and the learning rate over a training."""

import math

import torch
from torch import nn

from umtrain.config import OptimConfig

# The numbers that an optimizer holds for each parameter.
N_STATES = {"adamw": 2, "sgd": 1}


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trained if parameter.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in trained if parameter.ndim <= 1],
            "weight_decay": 0.0,
        },
    ]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=True
        )
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def create_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return warm-up then cosine or constant, stepped each update; or plateau, each epoch.

    Plateau has no warm-up: it starts at the full rate and falls to 0.3 of it after 4 epochs
    without a better validation.
    """
    if config.schedule == "plateau":
        # Absolute: relative to a negative best (an AUC's), an equal value would count as better.
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.3, patience=3, threshold=1e-4, threshold_mode="abs"
        )
    warmup_steps = round(config.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
