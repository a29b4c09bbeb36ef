"""Images that turned out to be unusable: left out, counted, and too many of them end the run."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TypedDict

from umtrain.data.isolated import ChildFailedError
from umtrain.data.manifest import AnyRecord, Split
from umtrain.errors import DataError

MAX_BAD_FRACTION = 0.05

_LOG = logging.getLogger(__name__)
_N_SHOWN = 10


class SkippedImage(TypedDict):
    """An image that was left out: its line in the manifest, when it was met, and why.

    `epoch` is that of training; 0 where it was met by an evaluation.
    """

    id: str
    row: int
    split: Split
    epoch: int
    reason: str


class Skipped:
    """The images of a manifest that are left out from the moment that one could not be read.

    A share of up to `max_fraction` of a split's rows may be; one row always, unless that is 0 or
    nothing would be left to train on.
    `entries` is what the record holds of them, in the order in which they were met.
    """

    def __init__(
        self, records: Collection[AnyRecord], max_fraction: float = MAX_BAD_FRACTION
    ) -> None:
        self.entries: list[SkippedImage] = []
        self._ids: set[tuple[Split, str]] = set()
        # By id: a manifest of patches has a row for every patch of a slide.
        self._n_rows = Counter(split for split, _ in {(r.split, r.id) for r in records})
        self._max_fraction = max_fraction

    def __contains__(self, record: AnyRecord) -> bool:
        return (record.split, record.id) in self._ids

    def restore(self, entries: Iterable[SkippedImage]) -> None:
        """Leave out what an earlier run of these images left out, whatever its number."""
        for entry in entries:
            self._ids.add((entry["split"], entry["id"]))
            self.entries.append(entry)

    def add(self, record: AnyRecord, epoch: int, error: DataError) -> None:
        """Leave `record` out from now on; DataError if that makes too many of its split."""
        if record in self:
            return
        reason = str(error)
        if isinstance(error, ChildFailedError):
            reason = f"{record.path}: the reader failed: {error}"
        entry = SkippedImage(
            id=record.id, row=record.row, split=record.split, epoch=epoch, reason=reason
        )
        self._check([entry])
        self.restore([entry])
        _LOG.warning("left out: row %d, %s of %s: %s", record.row, record.id, record.split, reason)

    def merge(self, entries: Iterable[SkippedImage]) -> None:
        """Leave out what another process has, too; DataError if that makes too many of a split."""
        new = [e for e in entries if (e["split"], e["id"]) not in self._ids]
        self._check(new)
        self.restore(new)

    def _check(self, new: Sequence[SkippedImage]) -> None:
        """Refuse what is too much before it is left out: a run that is started again meets it."""
        for split in {entry["split"] for entry in new}:
            of_split = [*self.of_split(split), *(e for e in new if e["split"] == split)]
            n_rows = self._n_rows[split]
            n_allowed = self._n_allowed(split, n_rows)
            if len(of_split) > n_allowed:
                raise DataError(_too_many(split, of_split, n_rows, n_allowed))

    def of_split(self, split: Split) -> list[SkippedImage]:
        """Return what is left out of `split`."""
        return [entry for entry in self.entries if entry["split"] == split]

    def _n_allowed(self, split: Split, n_rows: int) -> int:
        one = 1 if self._max_fraction > 0 else 0
        n_allowed = max(one, math.floor(self._max_fraction * n_rows))
        return min(n_allowed, n_rows - 1) if split == "train" else n_allowed


def _too_many(split: Split, entries: Sequence[SkippedImage], n_rows: int, n_allowed: int) -> str:
    lines = [f"  row {e['row']}, {e['id']}: {e['reason']}" for e in entries[:_N_SHOWN]]
    if len(entries) > _N_SHOWN:
        lines.append(f"  and {len(entries) - _N_SHOWN} more")
    return (
        f"{len(entries)} of {n_rows} images of split {split} cannot be read, and "
        f"dataset.max_bad_fraction lets {n_allowed} be left out:\n" + "\n".join(lines) + "\n"
        "Mend these files (`umtrain data check` finds all that is wrong), remove their rows, or "
        "raise dataset.max_bad_fraction"
    )
