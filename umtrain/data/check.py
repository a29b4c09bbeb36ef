"""The check of a manifest and of every file that it names."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umtrain.data.cells import SPLITS
from umtrain.data.ct import read_ct
from umtrain.data.digest import content_bytes, content_sha256
from umtrain.data.isolated import READ_LIMITS, Limits, map_isolated
from umtrain.data.manifest import (
    AnyRecord,
    Kind,
    Manifest,
    Radiograph,
    Slide,
    Volume,
    is_present,
    parse_manifest,
)
from umtrain.data.radiograph import pixel_spacing_mm, read_radiograph
from umtrain.data.wsi import read_slide, slide_info
from umtrain.errors import DataError, UmtrainError

_PREVIEW_PX = 256
_DAMAGED_FIX = "fetch the file again, or remove the row"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: in a row (the line it begins on), or in the table if `row` is None."""

    row: int | None
    id: str
    path: Path
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found: problems in the order of the rows, those of the whole table first."""

    n_rows: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Job:
    """A file to open, in a child process."""

    record: AnyRecord
    needs_mpp: bool
    needs_sha256: bool


@dataclass(frozen=True, slots=True)
class _Findings:
    """What opening a file brought: (what, fix) of each problem, and its digest if asked for."""

    problems: tuple[tuple[str, str], ...]
    sha256: str | None


def check_manifest(
    path: Path | str,
    kind: Kind,
    root: Path | str | None = None,
    *,
    needs_mpp: bool = False,
    workers: int = 2,
    limits: Limits = READ_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check a manifest's rows and open every file that they name; all problems are returned.

    Files are opened in `workers` child processes, so that one which makes a decoder crash or
    hang, or that wants more memory than `limits` allows, is a problem of its row. `needs_mpp` is
    for slides read at a given microns per pixel.
    `progress` is called with the number of files opened and the number to open.
    Raises ManifestError only if the manifest as a whole cannot be read.
    """
    manifest, row_problems = parse_manifest(path, kind, root)
    problems = [
        Problem(
            p.row, p.id, manifest.path, f"{p.column}: got {p.got}, expected {p.expected}", p.fix
        )
        for p in row_problems
    ]
    present = []
    for record in manifest.records:
        problems += _missing_files(record)
        if is_present(record):
            present.append(record)
    digests: dict[int, str] = {}
    jobs = _jobs(present, needs_mpp)
    results = map_isolated(_open, jobs, workers=workers, limits=limits)
    for n_done, (job, found) in enumerate(zip(jobs, results, strict=True), 1):
        problems += _file_problems(job.record, found)
        if isinstance(found, _Findings) and found.sha256 is not None:
            digests[job.record.row] = found.sha256
        if progress is not None:
            progress(n_done, len(jobs))
    problems += _duplicates(present, digests)
    problems += _gaps(manifest)
    problems.sort(key=lambda problem: problem.row or 0)
    n_unusable = len({p.row for p in row_problems} - {r.row for r in manifest.records})
    return CheckReport(len(manifest.records) + n_unusable, tuple(problems))


def _missing_files(record: AnyRecord) -> Iterator[Problem]:
    fix = "correct the path, or set dataset.root to the folder that paths start from"
    if not is_present(record):
        yield Problem(record.row, record.id, record.path, "missing file", fix)
    mask = record.mask if isinstance(record, Slide) else None
    if mask is not None and not mask.is_file():
        yield Problem(record.row, record.id, mask, "missing mask", fix)


def _jobs(records: Sequence[AnyRecord], needs_mpp: bool) -> list[_Job]:
    """Return what to open; digests are for rows that state one, and for files of equal size."""
    n_bytes = {record.row: content_bytes(record.path) for record in records}
    n_of_size = Counter(n_bytes.values())
    return [
        _Job(record, needs_mpp, record.sha256 is not None or n_of_size[n_bytes[record.row]] > 1)
        for record in records
    ]


def _open(job: _Job) -> _Findings:
    """Open one file and look at all that can be wrong with it. Runs in a child process."""
    record = job.record
    problems: list[tuple[str, str]] = []
    try:
        if isinstance(record, Slide):
            problems += _slide_problems(record, job.needs_mpp)
        elif isinstance(record, Volume):
            read_ct(record.path)
        else:
            problems += _radiograph_problems(record)
    except UmtrainError as error:
        problems.append(_what_and_fix(error, record.path))
    digest = None
    if job.needs_sha256:
        digest = content_sha256(record.path)
        if record.sha256 not in (None, digest):
            what = f"sha256: got {digest} from the file, expected {record.sha256}"
            problems.append((what, "fetch the file again, or correct the column"))
    return _Findings(tuple(problems), digest)


def _slide_problems(slide: Slide, needs_mpp: bool) -> Iterator[tuple[str, str]]:
    info = slide_info(slide.path)
    if needs_mpp and info.mpp is None and slide.mpp is None:
        yield "no mpp: neither the file nor the manifest has it", "fill in the column mpp"
    read_slide(slide.path, _PREVIEW_PX)


def _radiograph_problems(record: Radiograph) -> Iterator[tuple[str, str]]:
    image = read_radiograph(record.path)
    height_px, width_px = image.pixels.shape
    for name, x, y in (("c7", record.c7_x, record.c7_y), ("s1", record.s1_x, record.s1_y)):
        if not (-0.5 <= x < width_px - 0.5 and -0.5 <= y < height_px - 0.5):
            what = f"{name} is at ({x:g}, {y:g}), outside the image of {width_px}×{height_px} px"
            yield what, "give x and y in pixels of the stored image, x to the right"
    try:
        pixel_spacing_mm(image, record.mm_per_px, record.path)
    except UmtrainError as error:
        yield _what_and_fix(error, record.path)


def _what_and_fix(error: UmtrainError, path: Path) -> tuple[str, str]:
    """Split a reader's message, "path: what; fix", at its last semicolon."""
    text = str(error).removeprefix(f"{path}: ")
    what, _, fix = text.rpartition("; ")
    return (what, fix) if what else (text, _DAMAGED_FIX)


def _file_problems(record: AnyRecord, found: _Findings | DataError) -> Iterator[Problem]:
    if isinstance(found, DataError):
        what = f"unreadable: the reader failed on it: {found}"
        yield Problem(record.row, record.id, record.path, what, _DAMAGED_FIX)
        return
    for what, fix in found.problems:
        yield Problem(record.row, record.id, record.path, what, fix)


def _duplicates(records: Sequence[AnyRecord], digests: Mapping[int, str]) -> Iterator[Problem]:
    """Yield the rows whose file, or whose file's content, is that of an earlier row."""
    first_of_file: dict[tuple[int, int], AnyRecord] = {}
    first_of_content: dict[str, AnyRecord] = {}
    for record in records:
        status = record.path.stat()
        same = first_of_file.setdefault((status.st_dev, status.st_ino), record)
        kind = "file"
        if same is record and (digest := digests.get(record.row)):
            same = first_of_content.setdefault(digest, record)
            kind = "content"
        if same is not record:
            across = f", there in split {same.split}" if same.split != record.split else ""
            what = f"duplicate {kind}: row {same.row} ({same.id}) has the same{across}"
            yield Problem(record.row, record.id, record.path, what, "remove one of the two rows")


def _gaps(manifest: Manifest[AnyRecord]) -> Iterator[Problem]:
    """Yield the splits without rows, and those without some class."""
    labels_of_split: dict[str, set[str]] = defaultdict(set)
    for record in manifest.records:
        labels_of_split[record.split].add("" if isinstance(record, Radiograph) else record.label)
    for split in SPLITS:
        if split not in labels_of_split:
            what, fix = f"no rows in split {split}", "move some patients to it"
            yield Problem(None, "", manifest.path, what, fix)
            continue
        for label in sorted(set(manifest.classes) - labels_of_split[split]):
            what = f"class {label} is missing in split {split}"
            yield Problem(None, "", manifest.path, what, "move some of its patients to that split")
