"""What a step takes where the rows of one image are spread over devices, each streaming its band.

Each device holds a band of rows of every map. Before a convolution whose window is higher than a
row it gets the rows beside its band from its neighbours, and in backward their gradients go back;
after the step the gradients of the weights are summed over all. Within a node that goes over its
fast links, between nodes over the network.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

from umtrain.errors import ConfigError
from umtrain.memory.options import Options
from umtrain.planning.data_parallel import share_of_node
from umtrain.planning.predict import estimate
from umtrain.planning.profile import Profile
from umtrain.planning.step import StepTrace
from umtrain.planning.subject import Subject

_MOST_NODES = 64
_TWO_NEIGHBOURS, _LEAST_SIDES = 2, 2
_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Spread:
    """A step over `n_devices`: bytes are of each device, host bytes of all of a node's together.

    `exchanged_bytes` go from a device to others in a step, once for halos and gradients of halos,
    and twice for the gradients of weights (a ring's all-reduce).
    """

    n_devices: int
    fits: bool
    device_peak_bytes: int | None
    host_peak_bytes: int | None
    exchanged_bytes: float
    step_s: float | None


def spread_rows(
    subject_of_rows: Callable[[int], Subject],
    n_rows: int,
    profile: Profile,
    options: Options,
) -> list[Spread]:
    """Return predictions for 1, 2, 4, … devices, up to the first where all maps fit on them.

    A node has `profile.n_devices` of them and its host memory is shared; more is more nodes.
    """
    spreads: list[Spread] = []
    n_devices = 1
    while n_devices <= min(n_rows, _MOST_NODES * profile.n_devices):
        band = subject_of_rows(math.ceil(n_rows / n_devices))
        try:
            spreads.append(_spread(band, n_devices, profile, options))
        except ConfigError:
            # A band that is a single position at last has no spread to normalise by.
            break
        if spreads[-1].fits and not spreads[-1].host_peak_bytes:
            break
        n_devices *= 2
    return spreads


def _spread(band: Subject, n_devices: int, profile: Profile, options: Options) -> Spread:
    per_node = min(n_devices, profile.n_devices)
    prediction = estimate(band, "stream", *share_of_node(profile, options, per_node))
    step = band.trace()
    exchanged = 0.0
    step_s = prediction.step_s
    if n_devices > 1:
        ring = (n_devices - 1) / n_devices
        exchanged = halo_bytes(step) + 2 * ring * _learned_bytes(step)
        slowest = profile.peer_bytes_per_s if n_devices <= profile.n_devices else None
        slowest = slowest or profile.network_bytes_per_s or profile.out_bytes_per_s
        step_s = None if step_s is None else step_s + exchanged / slowest
    host = prediction.host_peak_bytes
    return Spread(
        n_devices=n_devices,
        fits=prediction.fits,
        device_peak_bytes=prediction.device_peak_bytes,
        host_peak_bytes=None if host is None else host * per_node,
        exchanged_bytes=exchanged,
        step_s=step_s,
    )


def halo_bytes(step: StepTrace) -> float:
    """Return what a device with two neighbours sends them in a step: rows, and their gradients.

    A window of k rows reaches (k - 1) rows beyond a band, half of them on each side. The rows of a
    volume are its slices.
    """
    total = 0.0
    for operation in step.operations:
        shape = operation.convolution
        if shape is None or len(shape.kernel) < _LEAST_SIDES:
            continue
        beyond = (shape.kernel[0] - 1) / 2
        n_images, _, *others = shape.output
        positions = math.prod(map(operator.mul, others, shape.stride[1:]))
        row_bytes = n_images * shape.in_channels * positions * _BYTES[operation.dtype]
        total += _TWO_NEIGHBOURS * beyond * row_bytes
    return total


def _learned_bytes(step: StepTrace) -> int:
    return sum(a.n_bytes for a in step.allocations if a.kind == "gradient")
