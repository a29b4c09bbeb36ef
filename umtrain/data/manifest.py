"""Manifests: the CSV tables that name the images, their patients, labels and splits.

Slides have the columns slide_id, patient_id, path, label, split and may have mpp, mask, sha256.
Radiographs have image_id, patient_id, path, c7_x, c7_y, s1_x, s1_y, split and may have mm_per_px,
facing, sha256. Volumes have volume_id, patient_id, path, label, split and may have window_center,
window_width, sha256. Other columns are left alone. Keypoints are in pixels of the stored image,
pixel centres at whole numbers, x to the right and y downwards.
"""

import csv
import gc
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from umtrain.data.cells import CELL_PARSERS, SPLITS, BadCellError, Facing, PathParser, Split
from umtrain.data.table import check_header, decode, iter_rows, read_content, shown
from umtrain.errors import ManifestError
from umtrain.files import write_atomic

__all__ = [
    "SPLITS",
    "AnyRecord",
    "Facing",
    "Kind",
    "Manifest",
    "Radiograph",
    "RowProblem",
    "Slide",
    "Split",
    "Volume",
    "is_present",
    "parse_manifest",
    "read_manifest",
    "write_manifest",
]

Kind = Literal["wsi", "spine", "ct"]

_N_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Slide:
    """One row of a slide manifest; `row` is its line in the file, `mpp` microns per pixel."""

    slide_id: str
    patient_id: str
    path: Path
    label: str
    split: Split
    mpp: float | None = None
    mask: Path | None = None
    sha256: str | None = None
    row: int = field(default=0, compare=False)

    @property
    def id(self) -> str:
        """The name this row has in predictions and reports."""
        return self.slide_id


@dataclass(frozen=True, slots=True)
class Radiograph:
    """One row of a radiograph manifest: C7 centre and posterior superior corner of S1, in px."""

    image_id: str
    patient_id: str
    path: Path
    c7_x: float
    c7_y: float
    s1_x: float
    s1_y: float
    split: Split
    mm_per_px: float | None = None
    facing: Facing | None = None
    sha256: str | None = None
    row: int = field(default=0, compare=False)

    @property
    def id(self) -> str:
        """The name this row has in predictions and reports."""
        return self.image_id


@dataclass(frozen=True, slots=True)
class Volume:
    """One row of a CT manifest: a NIfTI file or the folder of a DICOM series.

    The window, in Hounsfield units, is None where that of the configuration holds. `sha256` of a
    folder is that of its files one after another, in the order of their names.
    """

    volume_id: str
    patient_id: str
    path: Path
    label: str
    split: Split
    window_center: float | None = None
    window_width: float | None = None
    sha256: str | None = None
    row: int = field(default=0, compare=False)

    @property
    def id(self) -> str:
        """The name this row has in predictions and reports."""
        return self.volume_id


AnyRecord = Slide | Radiograph | Volume
Record = TypeVar("Record", Slide, Radiograph, Volume, AnyRecord)


@dataclass(frozen=True, slots=True)
class Manifest(Generic[Record]):
    """A manifest that was read: records in file order, their paths absolute, below `root`."""

    path: Path
    kind: Kind
    sha256: str
    root: Path
    records: tuple[Record, ...]

    def split(self, name: Split) -> tuple[Record, ...]:
        """Return the records of one split, in file order."""
        return tuple(record for record in self.records if record.split == name)

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that occur, sorted; none for radiographs."""
        labels = {getattr(record, "label", None) for record in self.records}
        return tuple(sorted(label for label in labels if label is not None))


def is_present(record: AnyRecord) -> bool:
    """Return whether what a row names is there: a file, or for a volume a folder of slices."""
    return record.path.exists() if isinstance(record, Volume) else record.path.is_file()


@dataclass(frozen=True, slots=True)
class RowProblem:
    """What is wrong with a cell or a row of a manifest, and how to put it right."""

    row: int
    id: str
    column: str
    got: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return (
            f"row {self.row}, {self.column}: got {self.got}, expected {self.expected}; {self.fix}"
        )


@dataclass(frozen=True, slots=True)
class _Schema:
    """The columns of one kind of manifest, the id first."""

    build: Callable[..., AnyRecord]
    required: tuple[str, ...]
    optional: tuple[str, ...]


_SCHEMAS: dict[Kind, _Schema] = {
    "wsi": _Schema(
        Slide,
        ("slide_id", "patient_id", "path", "label", "split"),
        ("mpp", "mask", "sha256"),
    ),
    "spine": _Schema(
        Radiograph,
        ("image_id", "patient_id", "path", "c7_x", "c7_y", "s1_x", "s1_y", "split"),
        ("mm_per_px", "facing", "sha256"),
    ),
    "ct": _Schema(
        Volume,
        ("volume_id", "patient_id", "path", "label", "split"),
        ("window_center", "window_width", "sha256"),
    ),
}


@overload
def read_manifest(
    path: Path | str, kind: Literal["wsi"], root: Path | str | None = None
) -> Manifest[Slide]: ...
@overload
def read_manifest(
    path: Path | str, kind: Literal["spine"], root: Path | str | None = None
) -> Manifest[Radiograph]: ...
@overload
def read_manifest(
    path: Path | str, kind: Literal["ct"], root: Path | str | None = None
) -> Manifest[Volume]: ...
@overload
def read_manifest(
    path: Path | str, kind: Kind, root: Path | str | None = None
) -> Manifest[Slide] | Manifest[Radiograph] | Manifest[Volume]: ...
def read_manifest(path: Path | str, kind: Kind, root: Path | str | None = None) -> Manifest[Any]:
    """Read a manifest; image paths are relative to `root`, or else to the manifest's folder.

    Absolute image paths are taken as they are; a relative one that climbs out of the root is
    refused. Whether the files exist is for `check_manifest` and the readers to say.
    Raises ManifestError, listing the bad rows (the first 20, and how many more there are).
    """
    manifest, problems = parse_manifest(path, kind, root)
    if problems:
        raise ManifestError(_summary(manifest.path, problems))
    return manifest


def parse_manifest(
    path: Path | str, kind: Kind, root: Path | str | None = None
) -> tuple[Manifest[Any], list[RowProblem]]:
    """Return the rows of a manifest that can be parsed, and what is wrong with rows.

    A row whose id or patient clashes with another row is both parsed and a problem.

    Raises ManifestError if the file as a whole cannot be read (absent, not UTF-8, not CSV,
    columns missing, no rows).
    """
    path = Path(path).absolute()
    content = read_content(path)
    base = path.parent if root is None else Path(root).absolute()
    records, problems = _parse(content, path, kind, base)
    digest = hashlib.sha256(content).hexdigest()
    return Manifest(path, kind, digest, base, tuple(records)), problems


def write_manifest(path: Path | str, kind: Kind, records: Sequence[AnyRecord]) -> None:
    """Write a manifest that `read_manifest` gives back equal; a reader never sees half of it.

    Image paths inside the manifest's folder become relative to it, others absolute. Optional
    columns that no record has a value for are left out.
    Raises ManifestError, and writes nothing, if `read_manifest` would refuse the rows or read
    them differently (as it would ids with spaces around them), or the folder cannot be written.
    """
    path = Path(path).absolute()
    content = _render(path, kind, records)
    read_back, problems = _parse(content, path, kind, path.parent)
    if problems:
        raise ManifestError(_summary(path, problems))
    for record, back in zip(records, read_back, strict=True):
        if record != back:
            raise ManifestError(
                f"{path}: {record} would be read back as {back}; remove spaces around its texts "
                "and make its paths absolute, without '..'"
            )
    try:
        write_atomic(path, lambda file: file.write(content))
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error


def _render(path: Path, kind: Kind, records: Sequence[AnyRecord]) -> bytes:
    schema = _SCHEMAS[kind]
    used = (c for c in schema.optional if any(getattr(r, c) is not None for r in records))
    columns = [*schema.required, *used]
    text = io.StringIO(newline="")
    # With "\r\n" as line end the csv module quotes cells that hold either character.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow([_cell(getattr(record, column), path.parent) for column in columns])
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{path}: {error.object[error.start : error.end]!r} cannot be written as UTF-8; "
            "rename the file or the id that it is part of"
        ) from error


def _cell(value: object, folder: Path) -> str:
    if isinstance(value, Path):
        return str(value.relative_to(folder) if value.is_relative_to(folder) else value)
    return "" if value is None else str(value)


def _parse(
    content: bytes, path: Path, kind: Kind, root: Path
) -> tuple[list[AnyRecord], list[RowProblem]]:
    """Return the records of the rows that can be parsed, and all problems, in file order."""
    schema = _SCHEMAS[kind]
    rows = iter_rows(decode(content, path), path)
    header = [cell.strip() for cell in next(rows, (1, list[str]()))[1]]
    check_header(header, schema.required, schema.optional, path)
    parser = _RowParser(schema, header, PathParser(root))
    with _gc_paused():
        records = [r for row, cells in rows if (r := parser.parse(row, cells)) is not None]
    if not records and not parser.problems:
        raise ManifestError(f"{path}: has a header but no rows; add one row per image")
    return records, parser.problems


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Keep the cycle collector from walking a million fresh, acyclic records again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _RowParser:
    """Turns rows into records, noting what is wrong and what must occur once."""

    def __init__(self, schema: _Schema, header: list[str], parse_path: PathParser) -> None:
        self.problems: list[RowProblem] = []
        self._schema = schema
        self._n_cells = len(header)
        parsers: dict[str, Callable[[str], object]] = {
            **CELL_PARSERS,
            "path": parse_path,
            "mask": parse_path,
        }
        self._cells: list[tuple[int, str, Callable[[str], object], bool]] = [
            (at, column, parsers[column], column in schema.optional)
            for at, column in enumerate(header)
            if column in schema.required + schema.optional
        ]
        self._id_column = schema.required[0]
        self._row_of_id: dict[str, int] = {}
        self._split_of_patient: dict[str, tuple[Split, int]] = {}

    def parse(self, row: int, cells: list[str]) -> AnyRecord | None:
        """Note what is wrong with a row; return its record unless a cell is unusable."""
        n_problems = len(self.problems)
        if len(cells) != self._n_cells:
            fix = "add the commas that are missing, or quote the text that holds one too many"
            expected = f"{self._n_cells}, as the header has"
            self._note(row, "", "its cells", str(len(cells)), expected, fix)
            return None
        values: dict[str, object] = {}
        for at, column, parse, is_optional in self._cells:
            cell = cells[at].strip()
            if cell or not is_optional:
                try:
                    values[column] = parse(cell)
                except BadCellError as bad:
                    record_id = str(values.get(self._id_column, ""))
                    self._note(row, record_id, column, shown(cell), bad.expected, bad.fix)
        if len(self.problems) > n_problems:
            return None
        record = self._schema.build(**values, row=row)
        self._check_unique(record)
        return record

    def _check_unique(self, record: AnyRecord) -> None:
        """Note it if another row has the same id, or has the patient in another split."""
        first_row = self._row_of_id.setdefault(record.id, record.row)
        if first_row != record.row:
            expected = f"an id of its own (row {first_row} has this one)"
            fix = "rename or remove one of the two"
            self._note(record.row, record.id, self._id_column, shown(record.id), expected, fix)
        split, split_row = self._split_of_patient.setdefault(
            record.patient_id, (record.split, record.row)
        )
        if split != record.split:
            got = f"{record.split!r} for patient {shown(record.patient_id)}"
            expected = f"{split!r} as in row {split_row}"
            fix = "keep all images of a patient in one split"
            self._note(record.row, record.id, "split", got, expected, fix)

    def _note(
        self, row: int, record_id: str, column: str, got: str, expected: str, fix: str
    ) -> None:
        self.problems.append(RowProblem(row, record_id, column, got, expected, fix))


def _summary(path: Path, problems: Sequence[RowProblem]) -> str:
    """Return the message that lists the first problems and counts the others."""
    n_rows = len({problem.row for problem in problems})
    lines = [f"{path}: {len(problems)} problem(s) in {n_rows} row(s)"]
    lines += [f"  {problem}" for problem in problems[:_N_SHOWN]]
    if len(problems) > _N_SHOWN:
        lines.append(f"  and {len(problems) - _N_SHOWN} more")
    return "\n".join(lines)
