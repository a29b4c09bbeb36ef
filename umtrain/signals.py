"""Requests to end: SIGTERM, SIGUSR1 (SLURM's warning before the time limit) and Ctrl-C.

# Note: [Ending between two states]
A run can be saved after a step, not in the middle of one: running statistics have moved and
weights have not. So work that takes the run from one state to the next is wrapped in `finishing`:
a signal then waits for its end, at most `grace_s`, and otherwise ends what is under way at once.
Python runs handlers between two of its own instructions: a backward pass that is a single call into
torch is not cut short, and the system's own patience decides.

# Note: [Ranks end after the same step]
Of several processes that train together each hears of a signal in an instant of its own, and what
one does without the others they wait for in vain. So all steps of an epoch are one `finishing`
around that of each: a signal waits until a step has told every rank of it, then all `end`.
"""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from umtrain.errors import Interrupted, RunError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A person who presses Ctrl-C waits for it.
_LONGEST_WAIT_OF_A_PERSON_S = 2.0


class StopRequest:
    """Turns the signals into Interrupted while it is entered; in the main thread only.

    `name` is that of the signal that came, None before.
    """

    def __init__(self, grace_s: float) -> None:
        self.name: str | None = None
        self._grace_s = grace_s
        self._is_busy = False
        self._has_heard = False  # itself: `name` may be what another rank has heard
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (*_SIGNALS, signal.SIGALRM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._disarm()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Generator[None]:
        """Let the block end first if a signal comes; then raise Interrupted.

        Inside another such block it is that one's end which is waited for.
        See Note: [Ending between two states].
        """
        is_inner, self._is_busy = self._is_busy, True
        try:
            yield
        except Exception as error:
            # Signals go to a whole group of processes: what fails now may have lost a helper. A
            # disk that is full has not.
            if self.name is None or isinstance(error, RunError):
                raise
            raise self._interruption() from error
        finally:
            self._is_busy = is_inner
            if not is_inner:
                self._disarm()
        if self.name is not None and not is_inner:
            self.end()

    def end(self) -> NoReturn:
        """Raise Interrupted."""
        raise self._interruption()

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_first, self._has_heard = not self._has_heard, True
        self.name = self.name or signal.Signals(number).name
        if not (is_first and self._is_busy):
            self.end()
        wait_s = self._grace_s
        if number == signal.SIGINT:
            wait_s = min(wait_s, _LONGEST_WAIT_OF_A_PERSON_S)
        # Zero would mean never.
        signal.setitimer(signal.ITIMER_REAL, max(wait_s, 1e-3))

    def _interruption(self) -> Interrupted:
        return Interrupted(f"interrupted by {self.name}")

    def _disarm(self) -> None:
        if self.name is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
