"""How alike two convolutions are: what is known of one is taken for another."""

import math
from functools import lru_cache

from umtrain.planning.step import Convolution

# In powers of two of each, a kernel's size most of all.
_WEIGHTS = {"kernel": 2.0, "in": 1.0, "out": 1.0, "stride": 1.0, "groups": 2.0, "pixels": 0.5}


@lru_cache(maxsize=2**16)
def unlikeness(one: Convolution, other: Convolution) -> float:
    """Return how far apart two convolutions are; 0 for two of one shape."""
    a, b = _features(one), _features(other)
    return math.sqrt(sum((_WEIGHTS[key] * (a[key] - b[key])) ** 2 for key in a))


def _features(convolution: Convolution) -> dict[str, float]:
    """Return logarithms of what a convolution's speed depends on."""
    return {
        "kernel": math.log2(math.prod(convolution.kernel)),
        "in": math.log2(convolution.in_channels),
        "out": math.log2(convolution.out_channels),
        "stride": math.log2(math.prod(convolution.stride)),
        "groups": math.log2(convolution.groups),
        "pixels": math.log2(math.prod(convolution.output)),
    }
