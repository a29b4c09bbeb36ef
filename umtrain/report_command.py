"""`umtrain report`: pages of runs and sweeps made again, several runs compared."""

from pathlib import Path

from umtrain.arguments import parse_arguments
from umtrain.console import Console
from umtrain.errors import ConfigError


def report(words: list[str], console: Console) -> int:
    """Make the page of one run or sweep again, or compare several runs; return the exit code.

    Raises ConfigError or RunError for words that name none.
    """
    given = parse_arguments(words, ("out",), n_files=len(words))
    folders = [Path(name).expanduser() for name in given.files]
    out = given.values.get("out")
    if not folders:
        raise ConfigError(
            "umtrain report takes a run directory, for example "
            "umtrain report runs/night; several are compared"
        )
    if len(folders) == 1:
        if out is not None:
            raise ConfigError(f"out={out}: a run's page lies in the run; out= is for comparisons")
        _again(folders[0], console)
        return 0
    from umtrain.sweep import is_sweep

    for folder in folders:
        if is_sweep(folder):
            raise ConfigError(f"{folder} is a sweep; name runs in it, such as {_a_run_of(folder)}")
    from umtrain.comparison import compare

    compare(folders, Path(out).expanduser() if out else None, console)
    return 0


def _again(folder: Path, console: Console) -> None:
    from umtrain.sweep import is_sweep, rebuild_sweep

    if is_sweep(folder):
        page = rebuild_sweep(folder)
    else:
        from umtrain.report.html import write_run_page
        from umtrain.report.record import read_record
        from umtrain.run_dir import read_predictions

        page = write_run_page(folder, read_record(folder), read_predictions(folder))
    console.say(f"report   {page}")


def _a_run_of(sweep: Path) -> Path:
    return next((path.parent for path in sorted(sweep.glob("*/metrics.json"))), sweep / "res-512")
