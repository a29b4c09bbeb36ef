"""Every strategy trains exactly as vanilla does, bit by bit."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
from torch import nn

from umtrain import models

STRATEGIES = ("vdnn", "lms", "um", "um_group", "um_group_prefetch", "checkpoint")
SHAPES = {
    "resnet18": (2, 3, 64, 64),
    "resnet50": (2, 3, 32, 32),
    "resnet101": (2, 3, 32, 32),
    "resunet35": (2, 1, 64, 64),
    "resnet18_3d": (2, 1, 18, 32, 40),
}


@cache
def _fresh(name: str) -> nn.Module:
    return models.create(name, in_channels=SHAPES[name][1], n_outputs=2)


def _build(name: str) -> Callable[[], nn.Module]:
    return lambda: deepcopy(_fresh(name))


@pytest.fixture(scope="module")
def reference_cache() -> dict[tuple[str, bool], object]:
    return {}


# Not in 3D: see Note: [3D convolutions in bf16] in umtrain/tasks/volumes.py.
@pytest.mark.parametrize(
    ("model_name", "bf16"),
    [
        *((name, False) for name in ("resnet18", "resnet101", "resunet35", "resnet18_3d")),
        *((name, True) for name in ("resnet18", "resnet50", "resunet35")),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_losses_gradients_and_statistics_as_vanilla(
    strategy, model_name, bf16, train, room, reference_cache
):
    build, shape = _build(model_name), SHAPES[model_name]
    key = (model_name, bf16)
    if key not in reference_cache:
        reference_cache[key] = train("vanilla", build, shape, bf16=bf16)
    room(2**20)
    outcome = train(strategy, build, shape, bf16=bf16)
    outcome.assert_same_bits(reference_cache[key])
    assert (outcome.swapped_out_bytes > 0) == (strategy != "checkpoint")
