"""Refuse a run that cannot have the memory it needs, before it trains.

A step takes device memory, on the CPU out of the same RAM that reader processes and their batches
need; swapped tensors take host memory. Only what surely fails is refused: the least that the
strategy can do with is more than there is, by more than predictions are off. In between is a
warning.
"""

import logging
from dataclasses import dataclass, replace

from umtrain.errors import ConfigError, OutOfMemoryError
from umtrain.memory.options import Options
from umtrain.planning.choice import CANDIDATES
from umtrain.planning.machine import free_profile
from umtrain.planning.predict import Prediction, estimate
from umtrain.planning.profile import Profile
from umtrain.planning.strategies import PLANNERS
from umtrain.planning.subject import Subject
from umtrain.units import format_bytes

_log = logging.getLogger(__name__)

# Predicted memory is within a tenth of what is measured; this much over is no mistake.
_SURE = 1.15
# A reader process: torch and the image libraries; and the image it decodes beside the batch.
_READER_BYTES = 250 * 2**20
_BATCHES_IN_READER = 2


@dataclass(frozen=True)
class Readers:
    """The processes that prepare batches, the bytes of one batch, and of what each keeps."""

    n: int
    batch_bytes: int
    kept_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        """Return about what all of them hold in RAM."""
        each_bytes = _READER_BYTES + _BATCHES_IN_READER * self.batch_bytes + self.kept_bytes
        return self.n * each_bytes


@dataclass(frozen=True)
class Demand:
    """What a run needs of one kind of memory, and what there is of it."""

    what: str
    needed_bytes: int
    free_bytes: int
    remedy: str

    @property
    def is_hopeless(self) -> bool:
        """Return whether it surely fails."""
        return self.needed_bytes > _SURE * self.free_bytes

    @property
    def is_doubtful(self) -> bool:
        """Return whether it may fail."""
        return self.needed_bytes > self.free_bytes

    @property
    def text(self) -> str:
        """Return the numbers, and what to change."""
        return (
            f"{self.what}: predicted to need at least {format_bytes(self.needed_bytes)}, and "
            f"there are {format_bytes(self.free_bytes)}; {self.remedy}"
        )


def check_run(subject: Subject, strategy: str, options: Options, readers: Readers) -> None:
    """Raise OutOfMemoryError, with the numbers, if the run surely cannot have its memory.

    Warns where it may not. Strategies that choose or plan by what is free, `auto` and `stream`,
    refuse by themselves what the readers leave too little for; a model that cannot be predicted is
    let through.
    """
    profile = free_profile(replace(options, readers_bytes=0), subject.model)
    found = [_of_readers(profile, readers)]
    if strategy in PLANNERS:
        try:
            prediction = estimate(subject, strategy, profile, options)
        except ConfigError as error:
            _log.info("memory=%s: %s", strategy, error)
        else:
            found = demands(prediction, profile, options, readers)
    for demand in found:
        if demand.is_hopeless:
            raise OutOfMemoryError(f"memory={strategy}: {demand.text}")
        if demand.is_doubtful:
            _log.warning("memory=%s: %s", strategy, demand.text)


def _of_readers(profile: Profile, readers: Readers) -> Demand:
    """Return what readers need of RAM."""
    ram_bytes = profile.host_bytes if profile.kind == "cuda" else profile.device_bytes
    remedy = f"lower dataset.workers (now {readers.n}), res or batch_size"
    return Demand("RAM, for readers", readers.n_bytes, ram_bytes, remedy)


def demands(
    prediction: Prediction, profile: Profile, options: Options, readers: Readers
) -> list[Demand]:
    """Return what a run needs of device memory, of RAM and of host memory."""
    least_bytes, host_bytes = prediction.least_budget_bytes, prediction.host_peak_bytes
    if least_bytes is None or host_bytes is None:
        return []
    others = " or ".join(n for n in CANDIDATES[profile.kind] if n != prediction.strategy)
    less = f"lower res or batch_size, or use memory=auto ({others})"
    found = []
    if options.device_budget_bytes is not None:
        what = "memory.device_budget"
        found.append(Demand(what, least_bytes, options.device_budget_bytes, f"raise it, {less}"))
    if profile.kind == "cuda":
        found.append(Demand("the GPU's memory", least_bytes, profile.device_bytes, less))
        what, room_bytes = "RAM, for readers and swapped tensors", profile.host_bytes
        needed_bytes = readers.n_bytes + host_bytes
    else:
        what, room_bytes = "RAM, for the step and readers", profile.device_bytes
        needed_bytes = least_bytes + readers.n_bytes
    remedy = f"lower dataset.workers (now {readers.n}), {less}"
    found.append(Demand(what, needed_bytes, room_bytes, remedy))
    if host_bytes and options.host_budget_bytes is not None:
        limit_bytes = options.host_budget_bytes
        found.append(Demand("memory.host_budget", host_bytes, limit_bytes, f"raise it, {less}"))
    elif host_bytes and profile.kind == "cpu":
        remedy = f"choose another memory.spill_dir, {less}"
        found.append(Demand("the spill file's disk", host_bytes, profile.host_bytes, remedy))
    return found
