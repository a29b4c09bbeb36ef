"""How umtrain takes damaged files, hostile manifests and hostile configurations: counts.

Why: whoever trains on other people's files meets broken ones, and some that were made to harm.
How: `--n` image files are made by mutation (scripts/mutations.py) from whole ones that umtrain's
own writers made: pyramidal TIFF, SVS, and DICOM films, plain and compressed. Each is read by what
`umtrain data check` reads with, and by the loader that training reads with. Hostile manifests and
configurations (scripts/hostile_texts.py) are parsed as the commands parse them.
Output: a table, and as the last line one JSON object. Ends with 1 if anything came out otherwise
than as read, refused in words, or given up with its reader replaced.

    python scripts/fuzz_inputs.py --n 500
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import hostile_texts
import mutations
import numpy as np
import psutil

from umtrain.data.check import check_manifest
from umtrain.data.dataset import RadiographDataset, SlideDataset
from umtrain.data.isolated import Limits, start_server
from umtrain.data.loader import make_loader
from umtrain.data.manifest import Radiograph, Slide, write_manifest
from umtrain.data.skipped import Skipped
from umtrain.data.synthetic.radiographs import make_radiographs
from umtrain.data.synthetic.slides import make_slides
from umtrain.data.wsi import read_slide
from umtrain.units import format_bytes

LIMITS = Limits(timeout_s=20.0, memory_bytes=2**30)
_WORKERS = 2
_RES = 64
_FOUND = ("read", "refused", "lost", "unexplained")


class PeakMemory:
    """The most resident memory of any process below this one, looked at 50 times a second."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    self.peak_bytes = max(self.peak_bytes, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


def whole_files(folder: Path) -> dict[str, list[bytes]]:
    """Return the bytes of valid files by kind."""
    (folder / "films").mkdir()
    (folder / "slides").mkdir()
    make_slides(folder / "slides", 2, 512, 0, None, 1)
    make_radiographs(folder / "films", 3, 200, 0, None, 1)
    slides = sorted((folder / "slides").rglob("*.tif"))
    films = sorted((folder / "films").rglob("*.dcm"))
    pixels, _ = read_slide(slides[0], 512)
    return {
        "tiff": [
            *(path.read_bytes() for path in slides),
            *(mutations.plain_tiff(pixels, name) for name in (None, "lzw", "deflate", "jpeg2000")),
        ],
        "svs": [mutations.svs_like(pixels)],
        "dicom": [*(path.read_bytes() for path in films), *mutations.compressed_films(films[0])],
    }


def damaged_files(folder: Path, whole: dict[str, list[bytes]], n: int, seed: int) -> list[Path]:
    """Write `n` damaged files, a third of each kind; their names say what was done to them."""
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(n):
        kind = list(whole)[number % len(whole)]
        of_kind = mutations.DICOM if kind == "dicom" else mutations.TIFF
        # Damage that knows the format gets deeper: two of three.
        mutate = (*mutations.ANY, *of_kind, *of_kind)[
            rng.integers(len(mutations.ANY) + 2 * len(of_kind))
        ]
        original = whole[kind][rng.integers(len(whole[kind]))]
        path = (
            folder / f"{kind}_{number:05d}_{mutate.__name__}{'.dcm' if kind == 'dicom' else '.svs'}"
        )
        path.write_bytes(mutate(original, rng))
        paths.append(path)
    return paths


def slides_and_films(paths: Sequence[Path]) -> tuple[list[Slide], list[Radiograph]]:
    slides, films = [], []
    for row, path in enumerate(paths, 2):
        if path.suffix == ".dcm":
            films.append(
                Radiograph(path.name, path.name, path, 10, 10, 20, 60, "test", 0.2, row=row)
            )
        else:
            slides.append(Slide(path.name, path.name, path, "0", "test", 1.0, row=row))
    return slides, films


def checked(folder: Path, slides: list[Slide], films: list[Radiograph]) -> dict[str, str]:
    """Return what `umtrain data check` makes of each file: "" or its problems."""
    found = {}
    for kind, records in (("wsi", slides), ("spine", films)):
        manifest = folder / f"{kind}.csv"
        write_manifest(manifest, kind, records)
        report = check_manifest(manifest, kind, workers=_WORKERS, limits=LIMITS)
        problems = {p.id: p.what for p in report.problems if not p.what.startswith("duplicate")}
        found |= {record.id: problems.get(record.id, "") for record in records}
    return found


def loaded(slides: list[Slide], films: list[Radiograph]) -> dict[str, str]:
    """Return what the loader makes of each file: "" or why it was left out."""
    found = {}
    for dataset in (SlideDataset(slides, {"0": 0}, _RES), RadiographDataset(films, _RES)):
        skipped = Skipped(dataset.records, max_fraction=1.0)
        loader = make_loader(
            dataset,
            4,
            shuffle=False,
            workers=_WORKERS,
            limits=LIMITS,
            skipped=skipped,
        )
        read = [name for batch in loader for name in batch["id"]]
        found |= dict.fromkeys(read, "") | {e["id"]: e["reason"] for e in skipped.entries}
    return found


def outcome(reason: str) -> str:
    """Return which of `_FOUND` a file came out as."""
    if not reason:
        return "read"
    if "the reader failed" not in reason:
        return "refused"
    lost = ("crashed", "no answer within", "of memory is needed")
    return "lost" if any(word in reason for word in lost) else "unexplained"


def count(name: str, found: dict[str, str], table: dict[str, dict[str, int]]) -> None:
    for kind in ("tiff", "svs", "dicom"):
        of_kind = [outcome(reason) for file, reason in found.items() if file.startswith(kind)]
        table[f"{kind}, {name}"] = {key: Counter(of_kind)[key] for key in _FOUND}


def fuzz_files(n: int, seed: int, keep: Path | None) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return counts by kind and reader, and what was not as it should be."""
    table: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if keep is None else keep
        (folder / "damaged").mkdir(parents=True)
        paths = damaged_files(folder / "damaged", whole_files(folder), n, seed)
        slides, films = slides_and_films(paths)
        by_check, by_loader = checked(folder, slides, films), loaded(slides, films)
    count("data check", by_check, table)
    count("loader", by_loader, table)
    assert len(by_check) == len(by_loader) == n, "a file is missing from the counts"
    wrong = [
        f"{file}: {reason}"
        for file, reason in [*by_check.items(), *by_loader.items()]
        if outcome(reason) == "unexplained"
    ]
    lost = [
        f"reader lost: {file}: {reason.split(': ', 1)[-1]}"
        for file, reason in by_loader.items()
        if outcome(reason) == "lost"
    ]
    for line in lost:
        print(line)
    return table, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=500, help="damaged image files")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest manifest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to keep the damaged files in")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    started_s = time.monotonic()
    # Readers that come back do so at once: what they import is there.
    start_server("umtrain.data.loader")
    with PeakMemory() as memory:
        table, wrong = fuzz_files(arguments.n, arguments.seed, arguments.keep)
    texts = {"manifests": hostile_texts.manifests, "configs": hostile_texts.configs}
    for name, tried in texts.items():
        counts, unexpected = tried()
        table[name] = {key: counts[key] for key in _FOUND}
        wrong += unexpected
    large = hostile_texts.large_manifest(arguments.rows)
    print(f"{'':<20}" + "".join(f"{key:>13}" for key in _FOUND))
    for name, counts in table.items():
        print(f"{name:<20}" + "".join(f"{counts[key]:>13}" for key in _FOUND))
    bound = f"bound: {format_bytes(LIMITS.memory_bytes)} of heap beside what it begins with"
    print(f"largest reader: {format_bytes(memory.peak_bytes)} resident ({bound})")
    print(f"manifest of {large['rows']} rows: {large['seconds']:.1f} s, ", end="")
    print(f"{format_bytes(large['memory_bytes'])}")
    for line in wrong:
        print(f"WRONG {line}")
    figures = {
        "n": arguments.n,
        "seed": arguments.seed,
        "outcomes": table,
        "wrong": len(wrong),
        "reader_peak_bytes": memory.peak_bytes,
        "reader_bound_bytes": LIMITS.memory_bytes,
        "large_manifest": large,
        "elapsed_s": time.monotonic() - started_s,
        "n_cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(figures))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
