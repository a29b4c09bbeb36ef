"""What a step takes where each of several devices trains on images of its own.

# Note: [Sums of gradients beside backward]
# Gradients come in backward, last layers first, and leave bucket by bucket while it goes on
# (umtrain/parallel/gradients.py). A sum over N devices by a ring moves 2(N-1)/N of a bucket's bytes
# over each link (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
# workstations", 2009), and buckets go one after another. What is still under way when backward has
# ended is waited for. Devices of a node sum over their fast links; with more nodes than one, the
# ring goes as fast as the network between them. That others use the network, and that ranks
# wait for the slowest, is not in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from umtrain.planning.predict import Prediction
from umtrain.planning.profile import Profile
from umtrain.planning.step import StepTrace
from umtrain.planning.subject import Subject

DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Scaling:
    """A step of `n_devices`, each with a batch of its own: predicted, not measured.

    `exchanged_bytes` go from each device to the next in a step, `waits_s` is what backward does
    not hide of it; `efficiency` is the images per second against as many single devices.
    """

    n_devices: int
    exchanged_bytes: float
    waits_s: float
    step_s: float
    images_per_s: float
    efficiency: float


def scale_out(
    prediction: Prediction, subject: Subject, n_images: int, profile: Profile, bucket_bytes: int
) -> list[Scaling]:
    """Return the predictions for 1 to 64 devices of `profile`, `n_images` on each in a step.

    Gradients are summed in buckets of `bucket_bytes`. Empty where the strategy's step is not
    known, or no link between devices is.
    """
    if prediction.step_s is None or link_bytes_per_s(profile, DEVICE_COUNTS[-1]) is None:
        return []
    trace = subject.trace()
    seconds = subject.seconds(trace, profile)
    stretch = prediction.step_s / sum(seconds)
    buckets = _buckets(trace, [stretch * each for each in seconds], bucket_bytes)
    return [_scaled(n, prediction.step_s, buckets, n_images, profile) for n in DEVICE_COUNTS]


def link_bytes_per_s(profile: Profile, n_devices: int) -> float | None:
    """Return the slowest link of a ring of `n_devices`; None if it is not known."""
    if n_devices <= profile.n_devices:
        return profile.peer_bytes_per_s
    return profile.network_bytes_per_s


def _scaled(
    n_devices: int,
    step_s: float,
    buckets: Sequence[tuple[int, float]],
    n_images: int,
    profile: Profile,
) -> Scaling:
    share = 2 * (n_devices - 1) / n_devices
    rate = link_bytes_per_s(profile, n_devices) or math.inf
    is_free_s = -math.inf
    for n_bytes, left_s in buckets:
        # Time is counted from the end of backward: a bucket is ready `left_s` before it.
        is_free_s = max(is_free_s, -left_s) + share * n_bytes / rate
    waits_s = max(0.0, is_free_s)
    together_s = step_s + waits_s
    return Scaling(
        n_devices=n_devices,
        exchanged_bytes=share * sum(n_bytes for n_bytes, _ in buckets),
        waits_s=waits_s,
        step_s=together_s,
        images_per_s=n_devices * n_images / together_s,
        efficiency=step_s / together_s,
    )


def _buckets(
    trace: StepTrace, seconds: Sequence[float], bucket_bytes: int
) -> list[tuple[int, float]]:
    """Return each bucket's bytes, and how many seconds before the end of backward it is full."""
    operations = trace.operations
    ends = [i for i, operation in enumerate(operations) if operation.phase == "backward"]
    end = ends[-1] + 1 if ends else len(operations)
    gradients = sorted(
        (each.first, each.n_bytes) for each in trace.allocations if each.kind == "gradient"
    )
    buckets: list[tuple[int, float]] = []
    filled_bytes = 0
    for position, (first, n_bytes) in enumerate(gradients):
        filled_bytes += n_bytes
        if filled_bytes >= bucket_bytes or position + 1 == len(gradients):
            buckets.append((filled_bytes, sum(seconds[first + 1 : end])))
            filled_bytes = 0
    return buckets
