"""Synthetic H&E slides as real files: pyramidal TIFF, masks and a manifest.

The positive class has small nests of large dark nuclei; see `slide_scene` for what keeps anything
else from telling the classes apart.
"""

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from umtrain.data.synthetic.processes import in_processes
from umtrain.data.synthetic.pyramid import TILE_PX, write_pyramid
from umtrain.data.synthetic.slide_render import SlideRenderer, rendered_strips
from umtrain.data.synthetic.slide_scene import build_scene
from umtrain.files import atomic_path, write_atomic

MPP = 1.0
MASK_DOWNSAMPLE = 16
COLUMNS = ("slide_id", "patient_id", "path", "label", "split", "mpp", "mask", "sha256")

_TWO_SLIDES_SHARE = 0.25
_STRIP_PX = 2 * TILE_PX
_MIN_PER_SPLIT = 2


@dataclass(frozen=True)
class SlideSpec:
    """One slide to be made: `label` is "1" with nests and "0" without."""

    slide_id: str
    patient_id: str
    label: str
    split: str
    seed: int


def plan_slides(n: int, seed: int) -> list[SlideSpec]:
    """Return `n` slides to make: labels balanced in each split, each patient in one split.

    About 65% are for training, 10% for validation, 25% for test. From 6 slides on, every split
    has both classes; with fewer, training comes first, then test. Some patients have two slides.
    """
    rng = np.random.default_rng(seed)
    specs: list[SlideSpec] = []
    n_patients = 0
    for split, n_slides in _split_sizes(n).items():
        labels = rng.permutation([index % 2 for index in range(n_slides)])
        second_of_patient = False
        for index, label in enumerate(labels):
            second_of_patient = (
                index > 0 and not second_of_patient and rng.uniform() < _TWO_SLIDES_SHARE
            )
            n_patients += not second_of_patient
            specs.append(
                SlideSpec(
                    slide_id=f"slide_{len(specs):04d}",
                    patient_id=f"patient_{n_patients - 1:04d}",
                    label=str(label),
                    split=split,
                    seed=int(np.random.SeedSequence((seed, len(specs))).generate_state(1)[0]),
                )
            )
    return specs


def write_slide(
    spec: SlideSpec, path: Path, size: int, mask_path: Path | None, threads: int = 1
) -> None:
    """Write the slide of `size` pixels a side, and its mask; same arguments, same bytes.

    The slide is a tiled JPEG TIFF with a pyramid, at 1 micron per pixel. The mask is an 8-bit PNG
    at a sixteenth of the size: 0 background, 1 benign tissue, 2 cancer. A file appears under its
    name only once it is whole.
    """
    scene = build_scene(size, spec.seed, positive=spec.label == "1")
    strips = rendered_strips(SlideRenderer(scene, spec.seed), _STRIP_PX, threads)
    with atomic_path(path) as part:
        write_pyramid(part, strips, size, MPP, threads)
    if mask_path is not None:
        mask = Image.fromarray(scene.mask)
        write_atomic(mask_path, lambda stream: mask.save(stream, format="PNG"))


def make_slides(
    folder: Path,
    n: int,
    size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
) -> Path:
    """Write `n` slides, their masks and manifest.csv into `folder`; return the manifest's path.

    Up to `processes` slides are made at once; a slide that has no process to share the machine
    with uses as many threads. `progress` is called with the number of slides done, and `n`.
    """
    specs = plan_slides(n, seed)
    for name in ("slides", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    threads = max(1, processes // max(n, 1))
    make_row = partial(_make_row, folder, size=size, threads=threads)
    rows: list[dict[str, str]] = []
    for row in in_processes(make_row, specs, processes):
        rows.append(row)
        if progress is not None:
            progress(len(rows), n)
    manifest = folder / "manifest.csv"
    with atomic_path(manifest) as part:
        _write_rows(part, rows)
    return manifest


def _split_sizes(n: int) -> dict[str, int]:
    if n < 3 * _MIN_PER_SPLIT:
        n_test = max(0, min(_MIN_PER_SPLIT, n - _MIN_PER_SPLIT))
        return {"train": n - n_test, "test": n_test}
    n_val = max(_MIN_PER_SPLIT, round(0.10 * n))
    n_test = max(_MIN_PER_SPLIT, round(0.25 * n))
    return {"train": n - n_val - n_test, "val": n_val, "test": n_test}


def _make_row(folder: Path, spec: SlideSpec, size: int, threads: int) -> dict[str, str]:
    path, mask = Path("slides") / f"{spec.slide_id}.tif", Path("masks") / f"{spec.slide_id}.png"
    write_slide(spec, folder / path, size, folder / mask, threads)
    with (folder / path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "slide_id": spec.slide_id,
        "patient_id": spec.patient_id,
        "path": path.as_posix(),
        "label": spec.label,
        "split": spec.split,
        "mpp": f"{MPP:g}",
        "mask": mask.as_posix(),
        "sha256": sha256,
    }


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
