"""The command line: finds the command, turns words into values, and errors into exit codes.

Nothing heavy is imported before the command is known: help answers at once.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from umtrain import __version__, texts
from umtrain.errors import ConfigError, ManifestError, RankError, UmtrainError

if TYPE_CHECKING:
    from umtrain.console import Console
    from umtrain.data.manifest import Split

_HELP = ("--help", "-h", "help")
EXIT_INTERRUPTED = 130
_FIRST_RANK_SPEAKS_S = 5.0
_OF_SEVERAL = ("fit", "eval")


def main(arguments: list[str] | None = None) -> int:
    """Run `umtrain` with `arguments` (default: the process's own); return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in _HELP:
        print(texts.overview())
        return 0
    if words[0] in ("--version", "-V"):
        print(f"umtrain {__version__}")
        return 0
    try:
        return _run(words[0], words[1:])
    except UmtrainError as error:
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt as error:
        # Where it went through an exec of text, as imports have, Python means to end by SIGINT,
        # whatever exit code it is given, until an exec has ended well.
        exec("")
        _say_interrupted(str(error))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; there is no one to tell.
        sys.stderr.close()
        return 1
    except OSError as error:
        # The disk is full, a folder cannot be written, a share has gone: not ours to mend.
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"umtrain: {where}{error.strerror}", file=sys.stderr)
        return ConfigError.exit_code


def _rank() -> int:
    """Return which of several processes that train together this is; 0 if it is alone."""
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def _say_interrupted(how: str = "") -> None:
    if _rank() == 0:
        print(f"umtrain: {how or 'interrupted'}", file=sys.stderr, flush=True)


@contextmanager
def _importing() -> Generator[None]:
    """Have Ctrl-C end this process at once while it imports, and has touched nothing yet.

    Native libraries call back into Python as they are imported: an exception there is one that they
    do not expect, and abort on.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        _say_interrupted()
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _complain(error: UmtrainError) -> None:
    """Say what is wrong, once: what is wrong for every rank, only the first one says."""
    if _rank() == 0:
        print(f"umtrain: {error}", file=sys.stderr)
    elif isinstance(error, ConfigError | ManifestError | RankError):
        time.sleep(_FIRST_RANK_SPEAKS_S)  # torchrun ends all as soon as one has ended
    else:
        print(f"umtrain: rank {_rank()}: {error}", file=sys.stderr)


def _run(command: str, words: list[str]) -> int:
    if command not in texts.COMMANDS:
        raise ConfigError(f"unknown command {command!r}; commands: {', '.join(texts.COMMANDS)}")
    if any(word in _HELP for word in words):
        print(texts.command_help(command))
        return 0
    if command not in _OF_SEVERAL and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"umtrain {command} is one process; torchrun is for fit and eval: leave it out here"
        )
    return _COMMANDS[command](words)


def _fit(words: list[str]) -> int:
    from umtrain.config import RESUME_WORDS, load_config

    resume = next((word[7:] for word in words if word.startswith("resume=")), "auto")
    if resume in RESUME_WORDS:
        config = load_config(words)
    else:
        from umtrain.run_dir import continued_config

        config = continued_config(words)
    with _importing():
        from umtrain.parallel.world import joined
        from umtrain.runner import fit

    with joined(config.device):
        fit(config, _console())
    return 0


def _sweep(words: list[str]) -> int:
    with _importing():
        from umtrain.sweep import sweep

    sweep(words, _console())
    return 0


def _eval(words: list[str]) -> int:
    from umtrain.arguments import parse_arguments

    keys = ("run", "split", "device", "precision", "dataset.manifest", "dataset.root")
    given = parse_arguments(words, (*keys, "dataset.workers", "cases"))
    split = cast("Split", given.choice("split", ("val", "test"), "test"))
    changes: dict[str, str | int] = {
        key: given.values[key] for key in keys[2:] if key in given.values
    }
    if "dataset.workers" in given.values:
        changes["dataset.workers"] = given.integer("dataset.workers", 0, 0)
    if "cases" in given.values:
        changes["cases"] = given.integer("cases", 0, 0)
    run = given.values.get("run")
    with _importing():
        from umtrain.parallel.world import joined
        from umtrain.runner import evaluate

    with joined(given.values.get("device", "auto")):
        evaluate(Path(run).expanduser() if run else None, split, changes, _console())
    return 0


def _plan(words: list[str]) -> int:
    with _importing():
        from umtrain.plan_command import plan

    return plan(words, _console())


def _limits(words: list[str]) -> int:
    with _importing():
        from umtrain.limits_command import limits

    return limits(words, _console())


def _report(words: list[str]) -> int:
    with _importing():
        from umtrain.report_command import report

    return report(words, _console())


def _data(words: list[str]) -> int:
    with _importing():
        from umtrain import data_commands

    actions = {
        "make": data_commands.make,
        "check": data_commands.check,
        "import": data_commands.import_table,
    }
    if not words or words[0] not in actions:
        got = f", not {words[0]!r}" if words else ""
        raise ConfigError(f"umtrain data takes make, check or import{got}; see umtrain data --help")
    return actions[words[0]](words[1:], _console())


def _doctor(words: list[str]) -> int:
    from umtrain.arguments import parse_arguments

    spill_dir = parse_arguments(words, ("memory.spill_dir",)).values.get("memory.spill_dir")
    if spill_dir is not None and not Path(spill_dir).is_dir():
        raise ConfigError(f"memory.spill_dir={spill_dir}: no such folder; make it, or name another")
    from rich.table import Table
    from rich.text import Text

    from umtrain.doctor import examine

    table = Table("", "found", "what to do")
    for finding in examine(Path(spill_dir) if spill_dir else None):
        table.add_row(*map(Text, (finding.subject, finding.found, finding.advice)))
    _console().show(table)
    return 0


def _completion(words: list[str]) -> int:
    if words != ["bash"]:
        raise ConfigError("umtrain completion knows one shell: umtrain completion bash")
    print(texts.completion_script())
    return 0


def _console() -> "Console":
    from umtrain.console import Console

    console = Console() if _rank() == 0 else Console.silent()
    console.relay_logging()
    return console


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "fit": _fit,
    "sweep": _sweep,
    "eval": _eval,
    "plan": _plan,
    "limits": _limits,
    "report": _report,
    "data": _data,
    "doctor": _doctor,
    "completion": _completion,
}
