"""What a person sees while work is under way: bars on a terminal, plain lines elsewhere.

Everything said also goes to the run's log.txt, once there is one.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_INTERVAL_S = 5.0
_PLAIN_WIDTH = 120


class Task(Protocol):
    """One piece of work of known length."""

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are complete, with a short `note` of the latest figures."""


class Console:
    """Prints for people, and keeps a log."""

    def __init__(self, rich: RichConsole | None = None) -> None:
        # Off a terminal nothing says how wide a line may be: a table should not be squeezed.
        width = None if sys.stdout.isatty() else _PLAIN_WIDTH
        self.rich = rich or RichConsole(highlight=False, width=width, soft_wrap=width is not None)
        self._log: IO[str] | None = None

    @classmethod
    def silent(cls) -> "Console":
        """Return one that prints nothing; it keeps a log all the same."""
        return cls(RichConsole(quiet=True))

    def relay_logging(self) -> None:
        """Say what umtrain's modules log, which know of no console."""
        logger = logging.getLogger("umtrain")
        logger.handlers = [_Relay(self)]
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def open_log(self, path: Path) -> None:
        """Append everything said from now on to `path` too."""
        self.close_log()
        self._log = path.open("a", encoding="utf-8")

    def close_log(self) -> None:
        """Stop logging."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        self.rich.print(text, markup=False)
        self.log(text)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or another rich renderable."""
        self.rich.print(renderable)
        if self._log is not None:
            plain = RichConsole(file=self._log, width=_PLAIN_WIDTH, color_system=None)
            plain.print(renderable)
            self._log.flush()

    def log(self, text: str) -> None:
        """Write one line to the log alone."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
            self._log.flush()

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Show the progress of `total` units of work until the block ends."""
        if self.rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.rich, transient=True) as bars:
                yield _Bar(bars, title, total)
        else:
            yield _Lines(self, title, total)


class _Relay(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(self.format(record))


class _Bar:
    def __init__(self, bars: Progress, title: str, total: int) -> None:
        self._bars = bars
        self._id = bars.add_task(title, total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        self._bars.update(self._id, completed=done, note=note)


class _Lines:
    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._start_s = self._last_s = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < LINE_INTERVAL_S:
            return
        self._last_s = now_s
        left_s = (now_s - self._start_s) / done * (self._total - done) if done else None
        left = f", {format_duration(left_s)} left" if left_s is not None else ""
        self._console.say(f"{self._title}: {done}/{self._total}{left}  {note}".rstrip())


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: "8.3 s", "4 min 05 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
