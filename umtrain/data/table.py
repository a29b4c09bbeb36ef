"""CSV tables with a header: decoding, rows with their line numbers, and the header's check."""

import codecs
import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from umtrain.errors import ManifestError

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_N_SHOWN_CHARACTERS = 80
# Paths are listed too, and are of no use if they are cut.
_N_LISTED = 1000


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises ManifestError if the file cannot be read or is not UTF-8.
    """
    return decode(read_content(path), path)


def read_content(path: Path) -> bytes:
    """Return the bytes of a file; ManifestError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"{path}: the table cannot be read ({error.strerror}); "
            "give an existing CSV file, for example dataset.manifest=data_manifests/slides.csv"
        ) from error


def decode(content: bytes, path: Path) -> str:
    """Return UTF-8 bytes as text; ManifestError with the line that is not, or if it is no text."""
    if content.startswith(_UTF16_MARKS):
        raise ManifestError(f"{path}: is UTF-16; save the table again as 'CSV UTF-8'")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise ManifestError(
            f"{path}: line {line} has a NUL byte: it is UTF-16, or no text; "
            "save the table again as 'CSV UTF-8'"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}: line {line} has byte 0x{content[error.start]:02x}, which is not UTF-8 "
            "(as in Latin-1 or Windows-1252); save the table again as 'CSV UTF-8'"
        ) from error


def iter_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line the row begins on, cells), leaving out rows without any text.

    Raises ManifestError where a row is no CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{path}: row {line} is no CSV ({error}); "
            "put texts that hold commas, quotes or line breaks in double quotes"
        ) from error


def check_header(
    header: Sequence[str], required: Sequence[str], optional: Sequence[str], path: Path
) -> None:
    """Raise ManifestError unless each required column is there once and none is misspelt."""
    expected = f"expected {','.join(required)}[,{','.join(optional)}]"
    if not header:
        raise ManifestError(f"{path}: is empty; {expected} in the first line")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise ManifestError(
            f"{path}: the header {shown(header[0])} has no commas; {expected}; "
            "save the table with commas between its columns"
        )
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise ManifestError(f"{path}: column {listed(twice)} is there twice; remove one")
    unknown = [column for column in header if column not in (*required, *optional)]
    _check_required(header, required, unknown, expected, path)
    for column in optional:
        near = [] if column in header else difflib.get_close_matches(column, unknown, 1, 0.8)
        if near:
            raise ManifestError(
                f"{path}: column {near[0]} is unknown but close to {column}; "
                f"rename it to {column} if that is what it holds, else to something less like it"
            )


def _check_required(
    header: Sequence[str],
    required: Sequence[str],
    unknown: Sequence[str],
    expected: str,
    path: Path,
) -> None:
    missing = [column for column in required if column not in header]
    if not missing:
        return
    hints = {column: near_hint(column, unknown) for column in missing}
    named = [f"{column} ({hint})" if hint else column for column, hint in hints.items()]
    raise ManifestError(f"{path}: missing {listed(named)}; found {listed(header)}; {expected}")


def near_hint(word: str, options: Iterable[str]) -> str:
    """Return "did you mean X?" for the options near `word`, or nothing if none is."""
    near = difflib.get_close_matches(word, list(options), n=2, cutoff=0.65)
    return f"did you mean {' or '.join(near)}?" if near else ""


def shown(text: str) -> str:
    """Return `text` quoted as messages have it, cut if it is long, control characters escaped."""
    more = "…" if len(text) > _N_SHOWN_CHARACTERS else ""
    return repr(text[:_N_SHOWN_CHARACTERS]) + more


def listed(names: Iterable[str], n_shown: int = 20) -> str:
    """Return the names with commas between them, the first `n_shown` if there are more."""
    names = [
        name if name.isprintable() and len(name) < _N_LISTED else shown(name) for name in names
    ]
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more
