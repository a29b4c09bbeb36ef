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

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from umtrain.memory.options import Options
from umtrain.planning.predict import Prediction
from umtrain.planning.profile import Profile
from umtrain.planning.step import StepTrace
from umtrain.planning.subject import Subject

DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)


# What a device takes on a machine of this profile, with these options.
Predict = Callable[[Profile, Options], Prediction]


@dataclass(frozen=True)
class Scaling:
    """A step of `n_devices`, each with a batch of its own: predicted, not measured.

    `host_peak_bytes` are of all devices of a node together, which share its host memory;
    `exchanged_bytes` go from each device to the next in a step, `waits_s` is what backward does
    not hide of it; `efficiency` is the images per second against as many single devices. Figures
    are None where a step cannot be planned, as it has not the memory.
    """

    n_devices: int
    fits: bool
    host_peak_bytes: int | None
    exchanged_bytes: float
    waits_s: float | None
    step_s: float | None
    images_per_s: float | None
    efficiency: float | None


def scale_out(
    predict: Predict,
    subject: Subject,
    n_images: int,
    profile: Profile,
    options: Options,
    bucket_bytes: int,
) -> list[Scaling]:
    """Return the predictions for 1 to 64 devices of `profile`, `n_images` on each in a step.

    Gradients are summed in buckets of `bucket_bytes`. Empty where a single device's step is not
    known, or no link between devices is.
    """
    predictions = {
        per_node: predict(*share_of_node(profile, options, per_node))
        for per_node in {min(n, profile.n_devices) for n in DEVICE_COUNTS}
    }
    alone_s = predictions[1].step_s
    if alone_s is None or link_bytes_per_s(profile, DEVICE_COUNTS[-1]) is None:
        return []
    job = _Job(subject, n_images, profile, bucket_bytes, alone_s)
    return [_scaled(n, predictions[min(n, profile.n_devices)], job) for n in DEVICE_COUNTS]


def share_of_node(profile: Profile, options: Options, per_node: int) -> tuple[Profile, Options]:
    """Return what is left to each of `per_node` devices that share the host memory of a node."""
    share_bytes = profile.host_bytes // per_node
    budget_bytes = options.host_budget_bytes
    if budget_bytes is not None:
        options = dataclasses.replace(options, host_budget_bytes=min(budget_bytes, share_bytes))
    return dataclasses.replace(profile, host_bytes=share_bytes), options


def link_bytes_per_s(profile: Profile, n_devices: int) -> float | None:
    """Return the slowest link of a ring of `n_devices`; None if it is not known."""
    if n_devices <= profile.n_devices:
        return profile.peer_bytes_per_s
    return profile.network_bytes_per_s


@dataclass(frozen=True)
class _Job:
    subject: Subject
    n_images: int
    profile: Profile
    bucket_bytes: int
    alone_s: float


def _scaled(n_devices: int, prediction: Prediction, job: _Job) -> Scaling:
    trace = job.subject.trace()
    share = 2 * (n_devices - 1) / n_devices
    host_bytes, step_s = prediction.host_peak_bytes, prediction.step_s
    waits_s = together_s = None
    if step_s is not None:
        seconds = job.subject.seconds(trace, job.profile)
        stretched = [step_s / sum(seconds) * each for each in seconds]
        rate = link_bytes_per_s(job.profile, n_devices) or math.inf
        waits_s = _waits_s(_buckets(trace, stretched, job.bucket_bytes), share / rate)
        together_s = step_s + waits_s
    return Scaling(
        n_devices=n_devices,
        fits=prediction.fits,
        host_peak_bytes=None
        if host_bytes is None
        else host_bytes * min(n_devices, job.profile.n_devices),
        exchanged_bytes=share * sum(a.n_bytes for a in trace.allocations if a.kind == "gradient"),
        waits_s=waits_s,
        step_s=together_s,
        images_per_s=None if together_s is None else n_devices * job.n_images / together_s,
        efficiency=None if together_s is None else job.alone_s / together_s,
    )


def _waits_s(buckets: Sequence[tuple[int, float]], s_per_byte: float) -> float:
    """Return what is still under way when backward has ended; times are counted from its end."""
    is_free_s = -math.inf
    for n_bytes, left_s in buckets:
        is_free_s = max(is_free_s, -left_s) + n_bytes * s_per_byte
    return max(0.0, is_free_s)


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
