"""Importers: the label tables that people already have, as manifests.

camelyon16: `reference.csv` of the test set (`test_001,Tumor,IDC,Macro`, with a header or not).
The training set has no table: its slides, `normal_001` and `tumor_001`, name their class.
panda: `train.csv` with image_id and isup_grade; cancer is a grade above 0. panda_isup keeps the
grades. clam: case_id, slide_id, label. simple: slide and class, with a header or not.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from umtrain.data.cells import Split
from umtrain.data.manifest import Manifest, Slide, read_manifest, write_manifest
from umtrain.data.splits import FRACTIONS, assign_splits
from umtrain.data.table import iter_rows, listed, near_hint, read_text
from umtrain.errors import ConfigError, ManifestError

FORMATS = ("camelyon16", "panda", "panda_isup", "clam", "simple")
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")

_CAMELYON_NAME = re.compile(r"(normal|tumor|test)_\d+", re.IGNORECASE)
_CAMELYON_LABELS = {"normal": "normal", "tumor": "tumor"}
# CAMELYON16 has its own test set: the rest is for training and validation.
_CAMELYON_FRACTIONS: Mapping[Split, float] = {"train": 0.9, "val": 0.1}
_HEADER_WORDS = {"slide", "slide_id", "image", "image_id", "name", "filename", "file", "case_id"}


class _Entry(NamedTuple):
    """A slide that a table names; `row` is the line it begins on."""

    row: int
    name: str
    patient_id: str
    label: str


class _Table(NamedTuple):
    """The header of a table in lower case, empty if it has none, and its other rows."""

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]


def import_table(
    path: Path | str,
    *,
    slides_root: Path | str,
    output: Path | str,
    table_format: str | None = None,
    seed: int = 0,
) -> Manifest[Slide]:
    """Write the manifest `output` for a label table, and return it.

    `table_format` is one of `FORMATS`; if None, it is told by the table's first line.
    Slides are looked for below `slides_root` by name, with or without one of `SLIDE_SUFFIXES`.
    Splits are drawn by patient (see `assign_splits`). Only clam tables name patients: in the
    others every slide counts as a patient of its own.
    Raises ConfigError if `table_format` is unknown; ManifestError, writing nothing, if the table is
    not of the format, or a slide is missing, there twice or named by two rows.
    """
    table = _read_table(Path(path))
    chosen = _detect(table) if table_format is None else table_format
    if chosen not in _READERS:
        raise ConfigError(
            f"format={chosen} is unknown; {near_hint(chosen, FORMATS)} "
            f"choose one of {listed(FORMATS)}, or leave it out"
        )
    found = _find_slides(Path(slides_root).absolute())
    entries = _READERS[chosen](table)
    if not entries:
        raise ManifestError(f"{table.path}: has no rows that name a slide; add some")
    _check_names(table.path, entries)
    slides = _located(table.path, entries, found, Path(slides_root).absolute())
    if chosen == "camelyon16":
        slides = _camelyon_splits(slides, found, seed)
    else:
        slides = assign_splits(slides, seed, FRACTIONS)
    write_manifest(output, "wsi", slides)
    return read_manifest(output, "wsi")


def detect_format(path: Path | str) -> str:
    """Return the format of a label table, from its header or its first row.

    Raises ManifestError if it is like none of them.
    """
    return _detect(_read_table(Path(path)))


def _read_table(path: Path) -> _Table:
    path = path.absolute()
    rows = [
        (row, [cell.strip() for cell in cells]) for row, cells in iter_rows(read_text(path), path)
    ]
    if not rows:
        raise ManifestError(f"{path}: is empty; expected a table of slides and their classes")
    first = [cell.lower() for cell in rows[0][1]]
    has_header = not _HEADER_WORDS.isdisjoint(first)
    return _Table(path, first, rows[1:]) if has_header else _Table(path, [], rows)


def _detect(table: _Table) -> str:
    if {"image_id", "isup_grade"} <= set(table.header):
        return "panda"
    if {"case_id", "slide_id", "label"} <= set(table.header):
        return "clam"
    cells = table.rows[0][1] if table.rows else []
    if len(cells) >= 2 and _CAMELYON_NAME.fullmatch(_stem(cells[0])):
        return "camelyon16"
    if len(cells) == 2:
        return "simple"
    raise ManifestError(
        f"{table.path}: is no label table that is known: its first line is "
        f"{','.join(table.header or cells)!r}; expected camelyon16 (test_001,Tumor,…), panda "
        "(image_id,…,isup_grade,…), clam (case_id,slide_id,label) or two columns, slide and class; "
        "bring it into one of these shapes"
    )


def _read_camelyon16(table: _Table) -> list[_Entry]:
    entries = []
    for row, cells in _rows_of(table, 2):
        label = _CAMELYON_LABELS.get(cells[1].lower())
        if label is None:
            raise ManifestError(
                f"{table.path}: row {row}: the class is {cells[1]!r}, expected Normal or Tumor; "
                "correct it, or import the table as simple"
            )
        entries.append(_Entry(row, cells[0], _stem(cells[0]), label))
    return entries


def _read_panda_isup(table: _Table) -> list[_Entry]:
    at_id, at_grade = _columns(table, "image_id", "isup_grade")
    entries = []
    for row, cells in _rows_of(table, len(table.header)):
        if cells[at_grade] not in set("012345"):
            raise ManifestError(
                f"{table.path}: row {row}: isup_grade is {cells[at_grade]!r}, expected 0 to 5; "
                "correct it or remove the row"
            )
        entries.append(_Entry(row, cells[at_id], cells[at_id], cells[at_grade]))
    return entries


def _read_panda(table: _Table) -> list[_Entry]:
    return [
        entry._replace(label="benign" if entry.label == "0" else "cancer")
        for entry in _read_panda_isup(table)
    ]


def _read_clam(table: _Table) -> list[_Entry]:
    at_case, at_slide, at_label = _columns(table, "case_id", "slide_id", "label")
    return [
        _Entry(row, cells[at_slide], cells[at_case], cells[at_label])
        for row, cells in _rows_of(table, len(table.header))
    ]


def _read_simple(table: _Table) -> list[_Entry]:
    for row, cells in table.rows:
        if len(cells) != 2:
            raise ManifestError(
                f"{table.path}: row {row} has {len(cells)} cells, expected two, slide and class; "
                "remove the other columns"
            )
    return [_Entry(row, cells[0], _stem(cells[0]), cells[1]) for row, cells in table.rows]


_READERS: dict[str, Callable[[_Table], list[_Entry]]] = {
    "camelyon16": _read_camelyon16,
    "panda": _read_panda,
    "panda_isup": _read_panda_isup,
    "clam": _read_clam,
    "simple": _read_simple,
}


def _rows_of(table: _Table, n_cells: int) -> list[tuple[int, list[str]]]:
    """Return the rows, all of which have at least `n_cells` cells."""
    for row, cells in table.rows:
        if len(cells) < n_cells:
            raise ManifestError(
                f"{table.path}: row {row} has {len(cells)} cells, expected {n_cells}; "
                "add what is missing"
            )
    return table.rows


def _columns(table: _Table, *names: str) -> list[int]:
    """Return where the columns are."""
    missing = [name for name in names if name not in table.header]
    if missing:
        raise ManifestError(
            f"{table.path}: column {listed(missing)} is missing; the first line is "
            f"{listed(table.header or table.rows[0][1])}; expected {','.join(names)} in it"
        )
    return [table.header.index(name) for name in names]


def _check_names(path: Path, entries: Sequence[_Entry]) -> None:
    first_row: dict[str, int] = {}
    for entry in entries:
        seen = first_row.setdefault(_stem(entry.name), entry.row)
        if seen != entry.row:
            raise ManifestError(
                f"{path}: row {entry.row} names {entry.name}, as row {seen} does; remove one"
            )


def _find_slides(root: Path) -> dict[str, list[Path]]:
    """Return the slide files below `root` by name without suffix."""
    if not root.is_dir():
        raise ManifestError(f"{root}: is no folder; give the one that the slides lie in")
    found: dict[str, list[Path]] = defaultdict(list)
    for folder, _, names in os.walk(root, followlinks=True):
        for name in sorted(names):
            if name.lower().endswith(SLIDE_SUFFIXES):
                found[_stem(name)].append(Path(folder) / name)
    return found


def _stem(name: str) -> str:
    """Return the last part of a name without a slide's suffix; other dots belong to the name."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    suffix = next((s for s in SLIDE_SUFFIXES if last.lower().endswith(s)), "")
    return last.removesuffix(last[len(last) - len(suffix) :]) if suffix else last


def _located(
    path: Path, entries: Sequence[_Entry], found: Mapping[str, Sequence[Path]], root: Path
) -> list[Slide]:
    """Return the entries as slides; ManifestError lists those without exactly one file."""
    slides, missing, ambiguous = [], [], []
    for entry in entries:
        stem = _stem(entry.name)
        files = _matching(entry.name, found.get(stem, ()))
        if len(files) == 1:
            slides.append(Slide(stem, entry.patient_id, files[0], entry.label, "train"))
        elif files:
            ambiguous.append(f"{entry.name} ({listed(map(str, files), 3)})")
        else:
            missing.append(entry.name)
    if missing:
        raise ManifestError(
            f"{path}: {len(missing)} of {len(entries)} slides are not below {root}: "
            f"{listed(missing)}; looked for {', '.join(SLIDE_SUFFIXES)}; "
            "fetch them, correct the folder, or remove their rows"
        )
    if ambiguous:
        raise ManifestError(
            f"{path}: {len(ambiguous)} slides have several files below {root}: "
            f"{listed(ambiguous)}; name them with folder and suffix, or give a folder further down"
        )
    return slides


def _matching(name: str, files: Sequence[Path]) -> list[Path]:
    """Return the files whose path ends in what the table names, if it names suffix or folder."""
    if name == _stem(name):
        return list(files)
    wanted = Path(name.replace("\\", "/")).parts
    exact = [file for file in files if file.parts[-len(wanted) :] == wanted]
    by_stem = [
        file for file in files if (*file.parts[:-1], _stem(file.name))[-len(wanted) :] == wanted
    ]
    return exact or by_stem


def _camelyon_splits(
    slides: Sequence[Slide], found: Mapping[str, Sequence[Path]], seed: int
) -> list[Slide]:
    """Return the table's slides as the test split, and the training slides as train and val.

    The training slides are those of the table, and those below the root, that are not test_….
    """
    training = {slide.slide_id: slide for slide in slides if not _is_test(slide.slide_id)}
    for stem, files in sorted(found.items()):
        match = _CAMELYON_NAME.fullmatch(stem)
        if match and not _is_test(stem):
            label = _CAMELYON_LABELS[match[1].lower()]
            training.setdefault(stem, Slide(stem, stem, files[0], label, "train"))
    tests = [replace(slide, split="test") for slide in slides if _is_test(slide.slide_id)]
    return assign_splits(list(training.values()), seed, _CAMELYON_FRACTIONS) + tests


def _is_test(stem: str) -> bool:
    return stem.lower().startswith("test_")
