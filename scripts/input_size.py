"""Does input size matter? The picture of the README, from two finished sweeps.

Why: a table of AUC and millimetres does not show what the network saw. Beside each resolution's
score this draws the same spot as the network is given it: a nest of large nuclei (a positive
slide), its lookalike (a cluster of lymphocytes on a negative slide) and C7 on a radiograph.
Method: reads summary.json of both sweeps, or a summary that an earlier call kept, and the images of
their manifests, or the same demo data made again; nothing is trained.
Output: a PNG, the two summaries beside it as JSON, and one JSON line with what was drawn.

Usage: python scripts/input_size.py WSI_SWEEP SPINE_SWEEP OUT_FOLDER
A sweep is its folder, or a JSON file that this script has written.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from umtrain.data.demo import demo_manifest
from umtrain.data.frame import apply_letterbox, network_width_px, plan_letterbox, transform
from umtrain.data.manifest import Kind, Manifest, Radiograph, Slide, read_manifest
from umtrain.data.radiograph import read_radiograph
from umtrain.data.wsi import read_slide
from umtrain.files import write_json
from umtrain.report.record import Record, figure

CANCER = 2
MASK_DOWNSAMPLE = 16
SLIDE_WINDOW_PX = 150
FILM_WINDOW_HEIGHT = 0.105  # of the film's


def nest_centre(slide: Slide) -> tuple[float, float]:
    """Return (x, y) at level 0 of the spot where most of the mask's cancer lies."""
    mask = np.asarray(Image.open(slide.mask)) == CANCER
    rows, columns = np.nonzero(mask)
    near = (np.abs(rows - rows[0]) < 12) & (np.abs(columns - columns[0]) < 12)
    scale = MASK_DOWNSAMPLE
    return (columns[near].mean() + 0.5) * scale, (rows[near].mean() + 0.5) * scale


def slide_crop(slide: Slide, centre: tuple[float, float], res: int) -> np.ndarray:
    """Return the window around `centre` (level 0) as the network sees it at `res`."""
    pixels, frame = read_slide(slide.path, res)
    x, y = (centre[0] - frame.l0_x) / frame.scale, (centre[1] - frame.l0_y) / frame.scale
    return window(pixels, x, y, SLIDE_WINDOW_PX / frame.scale)


def film_crop(film: Radiograph, res: int) -> np.ndarray:
    """Return the window around C7 as the network sees it at `res`."""
    stored = read_radiograph(film.path).pixels
    box = plan_letterbox(stored.shape, res, network_width_px(res, 0.5))
    (x, y) = transform(np.array([[film.c7_x, film.c7_y]]), box.to_network)[0]
    return window(apply_letterbox(stored, box), x, y, FILM_WINDOW_HEIGHT * res)


def window(pixels: np.ndarray, x: float, y: float, side_px: float) -> np.ndarray:
    """Return a square of `side_px` around (x, y)."""
    half = max(2, round(side_px / 2))
    top, left = max(0, round(y) - half), max(0, round(x) - half)
    return pixels[top : top + 2 * half, left : left + 2 * half]


def read_sweep(source: Path) -> list[Record]:
    """Return the records of a sweep's folder or of a kept summary."""
    path = source / "summary.json" if source.is_dir() else source
    records: list[Record] = json.loads(path.read_text())
    return records


def images(records: list[Record], kind: Kind) -> Manifest:
    """Return the manifest that the sweep used; exit unless its content is still the same."""
    data = records[0]["data"]
    largest = max(record["res"] for record in records)
    path = data["manifest"] or demo_manifest(
        kind, largest, lambda text: print(text, file=sys.stderr)
    )
    manifest = read_manifest(Path(path), kind)
    if manifest.sha256 != data["manifest_sha256"]:
        sys.exit(f"{path} is not the data of the {kind} sweep: run the sweep again")
    return manifest


def draw(wsi: list[Record], spine: list[Record], path: Path) -> None:
    """Draw the picture of both sweeps to `path`."""
    slides = images(wsi, "wsi").split("test")
    positive = next(s for s in slides if s.label == wsi[0]["data"]["positive"])
    nest = nest_centre(positive)
    films = images(spine, "spine").split("test")
    canvas = Figure(figsize=(12, 5.2), layout="constrained")
    grid = canvas.add_gridspec(2, 6)
    for column, record in enumerate(wsi[:4]):
        crops = (slide_crop(positive, nest, record["res"]), film_crop(films[0], record["res"]))
        for row, crop in enumerate(crops):
            axes = canvas.add_subplot(grid[row, column])
            axes.imshow(crop, cmap="gray", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"res={record['res']}", fontsize=11)
            if column == 0:
                axes.set_ylabel(("nest of tumour nuclei", "C7")[row])
    plot(canvas.add_subplot(grid[0, 4:]), wsi, "test.auc", "test.auc_ci", "test AUC")
    plot(canvas.add_subplot(grid[1, 4:]), spine, "test.mae_mm", "test.mae_ci_mm", "SVA error, mm")
    canvas.savefig(path, dpi=110)


def plot(axes, records: list[Record], key: str, interval: str, label: str) -> None:
    """Draw a figure of merit against resolution with its 95% interval."""
    res = [record["res"] for record in records]
    values = [figure(record, key) for record in records]
    low, high = zip(*(figure(record, interval) for record in records), strict=True)
    axes.fill_between(res, low, high, alpha=0.15, color="#2f6f9f", linewidth=0)
    axes.plot(res, values, "o-", color="#2f6f9f")
    axes.set(ylabel=label, xticks=res, xlabel="res", ylim=(0, None) if "mm" in key else None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def main() -> None:
    """Read the sweeps named on the command line and draw."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    sources = zip(("wsi", "spine"), sys.argv[1:3], strict=True)
    sweeps = {name: read_sweep(Path(source)) for name, source in sources}
    draw(sweeps["wsi"], sweeps["spine"], folder / "input_size.png")
    for name, records in sweeps.items():
        public = [{**r, "data": {**r["data"], "manifest": None}} for r in records]
        write_json(folder / f"sweep_{name}.json", public)
    keys = {"wsi": "test.auc", "spine": "test.mae_mm"}
    print(
        json.dumps(
            {
                name: {r["res"]: figure(r, keys[name]) for r in records}
                for name, records in sweeps.items()
            }
        )
    )


if __name__ == "__main__":
    main()
