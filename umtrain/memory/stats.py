"""The figures a strategy hands back."""

from dataclasses import dataclass, field, fields
from typing import Self


@dataclass(frozen=True)
class MemoryStats:
    """What one step did to memory; None where a figure cannot be had, with its reason.

    Peaks are the largest of all steps so far, everything else is of the last whole step.
    Device memory counts from what the process held before the model: parameters, gradients and
    optimizer state are in it.
    """

    steps: int
    device_peak_bytes: int | None
    host_peak_bytes: int | None
    rss_peak_bytes: int | None
    swapped_out_bytes: int | None
    swapped_in_bytes: int | None
    major_faults: int | None
    stall_s: float | None
    prefetch_hits: int | None
    prefetch_late: int | None
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def before_any_step(cls) -> Self:
        """Return stats that know nothing yet, and say so."""
        unknown = [figure.name for figure in fields(cls) if figure.name not in ("steps", "reasons")]
        return cls(
            steps=0,
            **dict.fromkeys(unknown),
            reasons=dict.fromkeys(unknown, "no step has finished yet"),
        )
