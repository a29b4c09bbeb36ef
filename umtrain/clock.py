"""How long a run takes over all its sessions."""

import time
from dataclasses import dataclass, field


@dataclass
class RunClock:
    """Begins when it is made; changes of the machine's clock do not change what it counts."""

    started_at_s: float = field(default_factory=time.time)
    before_s: float = 0.0
    _since_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Return the seconds of this session and, up to their last checkpoints, of those before."""
        return self.before_s + time.monotonic() - self._since_s

    def go_on(self, started_at_s: float, elapsed_s: float) -> None:
        """Continue the clock of a run that began at `started_at_s` and had come to `elapsed_s`."""
        self.started_at_s, self.before_s = started_at_s, elapsed_s
