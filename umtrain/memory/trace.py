"""What happened when in the last steps: the spans behind trace.json and timeline.png."""

import time
from dataclasses import dataclass
from typing import Literal

Lane = Literal["forward", "backward", "swap-out", "swap-in", "fault", "stall"]
LANES: tuple[Lane, ...] = ("forward", "backward", "swap-out", "swap-in", "fault", "stall")

_KEPT_STEPS = 2


@dataclass(frozen=True)
class Span:
    """Something that took from `start_s` to `end_s` (monotonic clock) in one step."""

    step: int
    lane: Lane
    name: str
    start_s: float
    end_s: float
    n_bytes: int


class Trace:
    """Collects spans from all threads; keeps those of the last steps only."""

    def __init__(self) -> None:
        self._step = -1
        self._spans: list[Span] = []

    def start_step(self) -> None:
        """Begin a step and forget those long past."""
        self._step += 1
        oldest = self._step - _KEPT_STEPS
        self._spans = [span for span in self._spans if span.step > oldest]

    def add(self, lane: Lane, name: str, start_s: float, n_bytes: int = 0) -> float:
        """Record a span that ends now; returns its length in seconds."""
        end_s = now_s()
        self._spans.append(Span(self._step, lane, name, start_s, end_s, n_bytes))
        return end_s - start_s

    def spans(self) -> list[Span]:
        """Return the spans kept, in order of their start."""
        return sorted(self._spans, key=lambda span: span.start_s)


def now_s() -> float:
    """Return the clock that spans are in."""
    return time.perf_counter()
