"""Demo data: synthetic slides, radiographs or volumes, made once and kept in a cache folder."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from umtrain.data import synthetic
from umtrain.data.manifest import Kind, is_present, read_manifest
from umtrain.data.synthetic.radiographs import make_radiographs
from umtrain.data.synthetic.slides import make_slides
from umtrain.data.synthetic.volumes import make_volumes
from umtrain.errors import DataError, ManifestError
from umtrain.files import cache_folder

SLIDE_SIZE_PX = 1536
N_SLIDES = 240
N_LARGE_SLIDES = 12
LARGE_SIZE_STEP_PX = 1024
# Half the rows of real films: twice what the default res asks for, a quarter of the disk.
RADIOGRAPH_SIZE_PX = 2048
N_RADIOGRAPHS = 360
LARGE_RADIOGRAPH_SIZE_PX = 4000
N_LARGE_RADIOGRAPHS = 200
VOLUME_SIZE_PX = 160
N_VOLUMES = 200
LARGE_VOLUME_SIZE_PX = 512
N_LARGE_VOLUMES = 24
SEED = 0

_STAMP = "demo.json"
_MANIFEST = "manifest.csv"
_Progress = Callable[[int, int], None] | None
_MAKERS: dict[Kind, Callable[[Path, int, int, int, _Progress, int], Path]] = {
    "wsi": make_slides,
    "spine": make_radiographs,
    "ct": make_volumes,
}
_NAMES: dict[Kind, str] = {"wsi": "slides", "spine": "radiographs", "ct": "volumes"}


@dataclass(frozen=True, slots=True)
class DemoSpec:
    """What the demo data of a kind is made of: `n` images of `size_px`."""

    kind: Kind
    n: int
    size_px: int
    seed: int = SEED

    @property
    def folder_name(self) -> str:
        """The name of the folder that it lies in."""
        return f"demo-{self.kind}-{self.n}x{self.size_px}"


def demo_spec(kind: Kind, res: int) -> DemoSpec:
    """Return what `demo_manifest` makes: slides of at least `res`, films of 2048 or 4000 rows.

    Volumes have 160 rows up to that `res`, else 512.
    """
    if kind == "spine" and res <= RADIOGRAPH_SIZE_PX:
        return DemoSpec(kind, N_RADIOGRAPHS, RADIOGRAPH_SIZE_PX)
    if kind == "spine":
        return DemoSpec(kind, N_LARGE_RADIOGRAPHS, LARGE_RADIOGRAPH_SIZE_PX)
    if kind == "ct" and res <= VOLUME_SIZE_PX:
        return DemoSpec(kind, N_VOLUMES, VOLUME_SIZE_PX)
    if kind == "ct":
        return DemoSpec(kind, N_LARGE_VOLUMES, LARGE_VOLUME_SIZE_PX)
    if res <= SLIDE_SIZE_PX:
        return DemoSpec(kind, N_SLIDES, SLIDE_SIZE_PX)
    return DemoSpec(kind, N_LARGE_SLIDES, -(-res // LARGE_SIZE_STEP_PX) * LARGE_SIZE_STEP_PX)


def demo_manifest(
    kind: Kind,
    res: int,
    say: Callable[[str], None],
    progress: _Progress = None,
) -> Path:
    """Return the manifest of the demo data for `res`, making the data if the cache has none.

    `say` is told what is done and where; `progress` is called with (images made, images to make).
    The cache is $UMTRAIN_CACHE, or else umtrain in $XDG_CACHE_HOME or ~/.cache. Several processes
    may ask at once: one makes the data and the others wait. What is half made is never used.
    Raises DataError if the cache folder cannot be written.
    """
    return ensure_demo(demo_spec(kind, res), cache_folder(), say, progress)


def ensure_demo(
    spec: DemoSpec,
    cache: Path,
    say: Callable[[str], None],
    progress: _Progress = None,
) -> Path:
    """Return the manifest of the data that `spec` asks for, below `cache`; see `demo_manifest`."""
    folder = cache / spec.folder_name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{spec.folder_name}.lock", say):
            if not _is_whole(folder, spec):
                say(f"No manifest given: making {spec.n} synthetic {_name(spec)} in {folder}")
                _make(folder, spec, progress)
            else:
                say(f"No manifest given: using the synthetic {_name(spec)} in {folder}")
    except OSError as error:
        raise DataError(
            f"{folder}: the demo data cannot be made ({error.strerror or error}); free some space "
            "there, point UMTRAIN_CACHE at another folder, or give dataset.manifest=PATH"
        ) from error
    return folder / _MANIFEST


def _name(spec: DemoSpec) -> str:
    return f"{_NAMES[spec.kind]} of {spec.size_px} px"


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock for the body; the kernel gives it back if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process is making this data; waiting for it (lock: {path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamp(spec: DemoSpec) -> dict[str, object]:
    """Return what the data depends on: the request, and the source of what makes it."""
    source = hashlib.sha256()
    for module in sorted(Path(synthetic.__path__[0]).glob("*.py")):
        source.update(module.read_bytes())
    return {**asdict(spec), "generator_sha256": source.hexdigest()}


def _is_whole(folder: Path, spec: DemoSpec) -> bool:
    """Return whether the folder holds what `spec` asks for, made by this version, all of it."""
    try:
        if json.loads((folder / _STAMP).read_text()) != _stamp(spec):
            return False
        records = read_manifest(folder / _MANIFEST, spec.kind).records
    except (FileNotFoundError, ValueError, ManifestError):
        return False
    return all(is_present(record) for record in records)


def _make(folder: Path, spec: DemoSpec, progress: _Progress) -> None:
    """Make the data beside `folder`, then put it in its place; the lock must be held."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make = _MAKERS[spec.kind]
        make(partial, spec.n, spec.size_px, spec.seed, progress, len(os.sched_getaffinity(0)))
        (partial / _STAMP).write_text(json.dumps(_stamp(spec), indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
