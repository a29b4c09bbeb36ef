"""`umtrain data make`, `data check` and `data import`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rich.table import Table
from rich.text import Text

from umtrain.arguments import parse_arguments
from umtrain.console import Console
from umtrain.data import importers
from umtrain.data.check import CheckReport, check_manifest
from umtrain.data.demo import LARGE_RADIOGRAPH_SIZE_PX, SLIDE_SIZE_PX, VOLUME_SIZE_PX
from umtrain.data.manifest import Kind
from umtrain.data.synthetic.radiographs import make_radiographs
from umtrain.data.synthetic.slides import make_slides
from umtrain.data.synthetic.volumes import SMALLEST_SIZE_PX, make_volumes
from umtrain.data.table import iter_rows, read_text
from umtrain.errors import ConfigError, DataError

_KINDS = ("wsi", "spine", "ct")
_Make = Callable[[Path, int, int, int, Callable[[int, int], None] | None, int], Path]
_MAKERS: dict[str, _Make] = {"wsi": make_slides, "spine": make_radiographs, "ct": make_volumes}
_SIZES_PX = {"wsi": SLIDE_SIZE_PX, "spine": LARGE_RADIOGRAPH_SIZE_PX, "ct": VOLUME_SIZE_PX}
_LEAST_SIZE_PX = {"wsi": 256, "spine": 256, "ct": SMALLEST_SIZE_PX}
_DEFAULT_N = 24
EXIT_PROBLEMS = 2


def make(words: list[str], console: Console) -> int:
    """Write synthetic images as real files with a manifest; the folder appears whole or not."""
    given = parse_arguments(words, ("dataset", "n", "size", "seed", "out"))
    kind = given.choice("dataset", _KINDS, "wsi")
    n = given.integer("n", _DEFAULT_N, 1)
    size_px = given.integer("size", _SIZES_PX[kind], _LEAST_SIZE_PX[kind])
    seed = given.integer("seed", 0, 0)
    out = Path(given.values.get("out", f"synthetic-{kind}")).expanduser()
    if out.exists():
        raise ConfigError(f"out={out} exists already; name a new folder")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        with console.task(f"making {n} files", n) as bar:
            _MAKERS[kind](partial, n, size_px, seed, lambda done, _: bar.update(done), _n_cores())
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.say(f"wrote {out / 'manifest.csv'} ({n} rows)")
    return 0


def check(words: list[str], console: Console) -> int:
    """Print what is wrong with a manifest and its files; 2 if anything is."""
    given = parse_arguments(words, ("dataset", "root", "fit"), n_files=1)
    if not given.files:
        raise ConfigError("umtrain data check needs a manifest: umtrain data check slides.csv")
    path = Path(given.files[0]).expanduser()
    kind = cast(Kind, given.choice("dataset", _KINDS, _kind_of(path)))
    root = given.values.get("root")
    fit = given.choice("fit", ("resize", "pad", "crop"), "resize")
    with console.task(f"checking {path.name}", _n_rows(path)) as bar:
        report = check_manifest(
            path,
            kind,
            Path(root).expanduser() if root is not None else None,
            needs_mpp=fit != "resize",
            workers=_n_cores(),
            progress=lambda done, _: bar.update(done),
        )
    if report.ok:
        console.say(f"{path}: {report.n_rows} rows, every file opens, nothing wrong")
        return 0
    console.show(_problem_table(report))
    n_problems = len(report.problems)
    noun = "problem" if n_problems == 1 else "problems"
    console.say(f"{path}: {n_problems} {noun} in {report.n_rows} rows")
    return EXIT_PROBLEMS


def import_table(words: list[str], console: Console) -> int:
    """Turn a CAMELYON16, PANDA, CLAM or plain table into a manifest."""
    keys = ("slides", "out", "format", "seed")
    given = parse_arguments(words, keys, n_files=1)
    if not given.files or "slides" not in given.values or "out" not in given.values:
        raise ConfigError(
            "umtrain data import needs a table, the slides' folder and a file to write: "
            "umtrain data import train.csv slides=/data/panda out=panda.csv"
        )
    out = Path(given.values["out"]).expanduser()
    if out.exists():
        raise ConfigError(f"out={out} exists already; name a new file")
    manifest = importers.import_table(
        Path(given.files[0]).expanduser(),
        slides_root=Path(given.values["slides"]).expanduser(),
        output=out,
        table_format=given.values.get("format"),
        seed=given.integer("seed", 0, 0),
    )
    console.say(f"wrote {out} ({len(manifest.records)} rows)")
    return 0


def _n_cores() -> int:
    return len(os.sched_getaffinity(0))


def _kind_of(path: Path) -> str:
    """Return the kind of a manifest by its id column, which only one kind has."""
    for _, cells in iter_rows(read_text(path), path):
        if "volume_id" in cells:
            return "ct"
        return "spine" if "image_id" in cells else "wsi"
    return "wsi"


def _n_rows(path: Path) -> int:
    return max(0, sum(1 for _ in iter_rows(read_text(path), path)) - 1)


def _problem_table(report: CheckReport) -> Table:
    table = Table("row", "id", "file", "what is wrong", "what to do")
    for problem in report.problems:
        row = "" if problem.row is None else str(problem.row)
        # As Text: an id or a file name is no markup, whatever brackets it has.
        table.add_row(*map(Text, (row, problem.id, problem.path.name, problem.what, problem.fix)))
    return table
