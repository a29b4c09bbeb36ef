"""What the text of each manifest column may be, and the value it stands for."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "val", "test"]
Facing = Literal["left", "right"]

SPLITS: tuple[Split, ...] = get_args(Split)
_SIDES: tuple[Facing, ...] = get_args(Facing)

# And what turns the direction of writing, which makes an id look like another.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_FORMULA_STARTS = ("=", "+", "-", "@")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class BadCellError(ValueError):
    """A cell is not what its column expects."""

    def __init__(self, expected: str, fix: str) -> None:
        super().__init__(expected)
        self.expected = expected
        self.fix = fix


def parse_text(cell: str) -> str:
    """Return the text; BadCellError if there is none, or it would steer a terminal."""
    if not cell:
        raise BadCellError("a text", "fill the cell in")
    if _CONTROL.search(cell):
        raise BadCellError("a text without control characters", "take the characters out")
    return cell


def parse_id(cell: str) -> str:
    """Return an id: a text that a spreadsheet does not take for a formula, as predictions.csv has
    it in its first column.
    """
    if cell.startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(cell):
        raise BadCellError(
            "an id that no spreadsheet takes for a formula", "begin it with a letter or a digit"
        )
    return parse_text(cell)


def parse_number(cell: str) -> float:
    """Return a finite number written with digits and a decimal point."""
    value = float(cell) if _NUMBER.fullmatch(cell) else math.nan
    if not math.isfinite(value):
        raise BadCellError("a number", "write it with a decimal point, for example 12.5")
    return value


def parse_length(cell: str) -> float:
    """Return a number above 0."""
    value = parse_number(cell)
    if value <= 0:
        raise BadCellError("a number above 0", "write the size of a pixel, or leave it empty")
    return value


def parse_window_width(cell: str) -> float:
    """Return a number above 0."""
    value = parse_number(cell)
    if value <= 0:
        raise BadCellError("a number above 0", "write Hounsfield units, or leave it empty")
    return value


def parse_split(cell: str) -> Split:
    """Return train, val or test."""
    if cell not in SPLITS:
        raise BadCellError("train, val or test", "write one of the three")
    return cell


def parse_facing(cell: str) -> Facing:
    """Return left or right: the side of the image that the patient faces."""
    if cell not in _SIDES:
        raise BadCellError("left or right", "write the side of the image the patient faces")
    return cell


def parse_sha256(cell: str) -> str:
    """Return 64 lower-case hexadecimal digits."""
    if not _SHA256.fullmatch(cell):
        raise BadCellError("64 hexadecimal digits", "write what sha256sum prints for the file")
    return cell.lower()


class PathParser:
    """Makes the paths of a manifest absolute, and keeps the relative ones inside its root."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.normpath(root))
        self._prefix = f"{self._root}{os.sep}"

    def __call__(self, cell: str) -> Path:
        """Return the absolute path; BadCellError if it is empty or climbs out of the root."""
        if not cell or _CONTROL.search(cell):
            raise BadCellError("the path of a file", "write it relative to the root")
        is_absolute = cell.startswith(os.sep)
        joined = cell if is_absolute else self._prefix + cell
        if ".." not in cell:
            return Path(joined)
        path = Path(os.path.normpath(joined))
        if not is_absolute and self._root not in path.parents:
            raise BadCellError(
                f"a path inside {self._root}", "write it in full, or set dataset.root higher up"
            )
        return path


CELL_PARSERS: dict[str, Callable[[str], object]] = {
    "slide_id": parse_id,
    "image_id": parse_id,
    "volume_id": parse_id,
    "patient_id": parse_text,
    "label": parse_text,
    "split": parse_split,
    "mpp": parse_length,
    "mm_per_px": parse_length,
    "c7_x": parse_number,
    "c7_y": parse_number,
    "s1_x": parse_number,
    "s1_y": parse_number,
    "facing": parse_facing,
    "window_center": parse_number,
    "window_width": parse_window_width,
    "sha256": parse_sha256,
}
