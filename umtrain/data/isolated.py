"""Calls in child processes, so that what a call does to its process cannot end ours."""

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_GRACE_S = 1.0


class ChildFailedError(Exception):
    """A child process died, hung or raised during a call; the text says which."""


class _Child(Generic[Argument, Result]):
    """A function of one picklable argument, run in a process that is replaced if it dies.

    The process is spawned, not forked: it has none of our threads' locks.
    """

    def __init__(self, function: Callable[[Argument], Result], timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._ended = False

    def call(self, argument: Argument) -> Result:
        """Return function(argument); ChildFailedError if it raised or its process failed."""
        connection = self._connection or self._start()
        try:
            connection.send(argument)
            if not connection.poll(self._timeout_s):
                self.close()
                raise ChildFailedError(f"no answer within {self._timeout_s:g} s")
            succeeded, answer = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise ChildFailedError(f"the process crashed ({self.close()})") from error
        if not succeeded:
            raise ChildFailedError(answer)
        result: Result = answer
        return result

    def kill(self) -> None:
        """End the process, whatever it is doing, and start no other; from any thread."""
        self._ended = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> str:
        """End the process, let go of what belongs to it, and return how it ended."""
        ending = ""
        if self._process is not None:
            self._process.join(_GRACE_S)
            self._process.kill()
            self._process.join()
            ending = _ending(self._process.exitcode)
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None
        return ending

    def _start(self) -> Connection:
        if self._ended:
            raise ChildFailedError("not run")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._process.start()
        theirs.close()
        return self._connection


def map_isolated(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    *,
    workers: int,
    timeout_s: float,
) -> Iterator[Result | ChildFailedError]:
    """Yield function(argument), or how its process failed, for each argument, in order.

    `function` and its arguments must be picklable. At most `workers` processes run at once; each
    serves many calls, and one that crashed, or took over `timeout_s`, is replaced.
    """
    children = [_Child(function, timeout_s) for _ in range(max(1, min(workers, len(arguments))))]
    idle: queue.SimpleQueue[_Child[Argument, Result]] = queue.SimpleQueue()
    for child in children:
        idle.put(child)

    def call(argument: Argument) -> Result | ChildFailedError:
        child = idle.get()
        try:
            return child.call(argument)
        except ChildFailedError as error:
            return error
        finally:
            idle.put(child)

    threads = ThreadPoolExecutor(len(children))
    try:
        yield from threads.map(call, arguments)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()
        threads.shutdown()
        for child in children:
            child.close()


def _serve(connection: Connection, function: Callable[[Argument], Result]) -> None:
    """Answer calls until the other end is gone. Runs in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            argument = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(argument))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
        else:
            connection.send(answer)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
