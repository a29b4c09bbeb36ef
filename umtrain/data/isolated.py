"""Calls in child processes, so that what a call does to its process cannot end ours.

# Note: [Readers are clean processes]
Children are forked from a fork server: a fresh process that has imported the readers and nothing
else. A fork of the training process itself would take along its threads' locks (OpenMP, I/O
threads, CUDA) and its mappings, and Python 3.12 and later warn of it. The server imports once, so
a child starts at once, and another one as soon after it has died.
"""

import atexit
import contextlib
import multiprocessing
import os
import queue
import resource
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from umtrain.data.transfer import receive, send
from umtrain.errors import DataError
from umtrain.processes import deaf_to_interrupts
from umtrain.units import format_bytes

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_Calls = queue.SimpleQueue[tuple[Argument, Future[Result]] | None]

_GRACE_S = 1.0
# What a child has to import may lie on a slow share; it is no part of a call's time.
_START_S = 600.0


class ChildFailedError(DataError):
    """A child process died, hung or raised what is no DataError during a call; the text says which.

    `crashed`: it died, which something else may have done to it.
    """

    def __init__(self, text: str, crashed: bool = False) -> None:
        super().__init__(text)
        self.crashed = crashed


@dataclass(frozen=True, slots=True)
class Limits:
    """What a call may cost: seconds, and heap beyond what its process began with (RLIMIT_DATA)."""

    timeout_s: float
    memory_bytes: int


# Generous: a slow share may take minutes; decoders with their caches, and the largest films.
READ_LIMITS = Limits(timeout_s=600.0, memory_bytes=3 * 2**30)


class _Child(Generic[Argument, Result]):
    """A function of one picklable argument, run in a process that is replaced if it dies."""

    def __init__(self, function: Callable[[Argument], Result], limits: Limits) -> None:
        self._function = function
        self._limits = limits
        self._process: ForkServerProcess | None = None
        self._connection: Connection | None = None
        self._ended = threading.Event()

    def call(self, argument: Argument) -> Result:
        """Return function(argument); its DataError, or ChildFailedError if its process failed."""
        try:
            connection = self._connection or self._start()
            send(connection, argument)
            succeeded, answer = self._receive(connection, self._limits.timeout_s)
        except (EOFError, OSError) as error:
            text = f"the process crashed ({self.close()})"
            raise ChildFailedError(text, crashed=True) from error
        if not succeeded:
            raise answer if isinstance(answer, DataError) else ChildFailedError(answer)
        result: Result = answer
        return result

    def _receive(self, connection: Connection, timeout_s: float) -> tuple[bool, Any]:
        if not connection.poll(timeout_s):
            self.close()
            raise ChildFailedError(f"no answer within {timeout_s:g} s")
        succeeded, answer = receive(connection)
        return succeeded, answer

    def kill(self) -> None:
        """End the process, whatever it is doing, and start no other; from any thread."""
        self._ended.set()
        process = self._process
        if process is not None:
            process.kill()

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
        if self._ended.is_set():
            raise ChildFailedError("not run")
        context = start_server(_module_of(self._function))
        connection, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, self._function, self._limits.memory_bytes), daemon=True
        )
        process.start()
        theirs.close()
        self._process, self._connection = process, connection
        if self._ended.is_set():  # `kill` came when there was nothing to kill yet
            process.kill()
        self._receive(connection, _START_S)
        return connection


class Children(Generic[Argument, Result]):
    """Processes that call one picklable function; each serves many calls, and is replaced if need
    be.

    A call whose process dies is made `n_tries` times: something else may have killed it. They end
    with `close`, with this object, or with this process, however that ends.
    """

    def __init__(
        self, function: Callable[[Argument], Result], n: int, limits: Limits, n_tries: int = 1
    ) -> None:
        self._children = [_Child(function, limits) for _ in range(n)]
        self._calls: _Calls[Argument, Result] = queue.SimpleQueue()
        self._threads = [
            # Daemons: the end of this process must not wait for a call.
            threading.Thread(target=_work, args=(child, self._calls, n_tries), daemon=True)
            for child in self._children
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _end, self._children, self._calls)

    def submit(self, argument: Argument) -> "Future[Result]":
        """Return what will be function(argument), or its error, once a process is free."""
        future: Future[Result] = Future()
        self._calls.put((argument, future))
        return future

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._finalizer()
        for thread in self._threads:
            thread.join()


def map_isolated(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    *,
    workers: int,
    limits: Limits,
) -> Iterator[Result | DataError]:
    """Yield function(argument), its DataError, or how its process failed (ChildFailedError), for
    each argument, in order.

    `function` and its arguments must be picklable. At most `workers` processes run at once; each
    serves many calls, and one that crashed, or went over the limits, is replaced.
    """
    if not arguments:
        return
    children = Children(function, max(1, min(workers, len(arguments))), limits)
    try:
        for answer in [children.submit(argument) for argument in arguments]:
            try:
                found: Result | DataError = answer.result()
            except DataError as error:
                found = error
            yield found
    finally:
        children.close()


def call_isolated(
    function: Callable[[Argument], Result], argument: Argument, limits: Limits = READ_LIMITS
) -> Result:
    """Return function(argument), called in a process of its own.

    Raises its DataError, or ChildFailedError if the process failed.
    """
    (answer,) = map_isolated(function, [argument], workers=1, limits=limits)
    if isinstance(answer, DataError):
        raise answer
    return answer


def _module_of(function: Callable[..., object]) -> str:
    return str((function.func if isinstance(function, partial) else function).__module__)


def start_server(preload: str) -> ForkServerContext:
    """Return the context that children are started in, its server running.

    The module `preload` is what a server that is not there yet imports for its children; it does
    not inherit limits that are put on this process later.
    See Note: [Readers are clean processes].
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload, "umtrain.data.server_end"])
    # Sent to a whole group of processes they are for this one to answer, which needs its readers.
    with deaf_to_interrupts():
        forkserver.ensure_running()
    return context


def _end_server() -> None:
    """End the server with this process: one that is still importing would notice only then."""
    pid = vars(forkserver)["_forkserver"]._forkserver_pid
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


atexit.register(_end_server)


def _work(child: _Child[Argument, Result], calls: _Calls[Argument, Result], n_tries: int) -> None:
    """Make calls until there are no more. Runs in a thread of its own for each child."""
    while (item := calls.get()) is not None:
        argument, future = item
        if future.set_running_or_notify_cancel():
            _answer(child, argument, future, n_tries)
        del argument, future, item  # an image must not live on while this thread waits
    child.close()


def _answer(
    child: _Child[Argument, Result], argument: Argument, future: "Future[Result]", n_tries: int
) -> None:
    for n_left in reversed(range(n_tries)):
        try:
            future.set_result(child.call(argument))
        except ChildFailedError as error:
            if error.crashed and n_left:
                continue
            future.set_exception(error)
        except BaseException as error:  # the one who waits for the answer must learn of it
            future.set_exception(error)
        return


def _end(children: Sequence[_Child[Argument, Result]], calls: _Calls[Argument, Result]) -> None:
    with contextlib.suppress(queue.Empty):
        while (item := calls.get_nowait()) is not None:
            item[1].cancel()
    for child in children:
        calls.put(None)
        child.kill()


def _serve(
    connection: Connection, function: Callable[[Argument], Result], memory_bytes: int
) -> None:
    """Answer calls until the other end is gone. Runs in the child."""
    _end_with_parent()
    # What a crash would leave behind is the image of a patient.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_bytes = psutil.Process().memory_info().data + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    send(connection, (True, None))
    while True:
        try:
            argument = receive(connection)
        except EOFError:
            return
        try:
            answer: tuple[bool, object] = (True, function(argument))
        except MemoryError:
            answer = (False, f"more than {format_bytes(memory_bytes)} of memory is needed")
        except DataError as error:
            answer = (False, error)
        except Exception as error:
            answer = (False, _described(error))
        send(connection, answer)
        del answer


def _described(error: Exception) -> str:
    """Return what was raised and where; not its text, which may quote what is in a file."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"


def _end_with_parent() -> None:
    """Make this process end when the one that asked for it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
