"""Times read_slide against OpenSlide's own raw read of the same level, and its extra memory.

Why: a whole slide is read for every training step, so reading must not cost much more than
decoding its tiles, nor hold more than the image and a few strips.

Method: a synthetic slide (or --slide) is read at --res by `umtrain.data.wsi.read_slide`, and raw:
read_region over the same pyramid level in strips of 512 rows, nothing kept or resampled. Both
sides run in turn, --repeats times after one warm-up each, each with a handle of its own; medians
are compared. Peak extra memory is the peak resident set of a fresh process that reads once, less
what was resident before; it includes the image that is returned.

Output: the last line is one JSON object: slide, res, level, raw_s, read_s (medians), ratio,
image_bytes, peak_extra_bytes, cpus, load.

    python scripts/bench_wsi_read.py --size 10240 --res 10000
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import openslide

from umtrain.data.synthetic.slides import SlideSpec, write_slide
from umtrain.data.wsi import best_level, plan_frame, read_slide, slide_info

RAW_STRIP_ROWS = 512


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.slide
        if path is None:
            path = Path(folder) / "slide.tif"
            spec = SlideSpec("slide", "patient", "1", "train", seed=0)
            write_slide(spec, path, arguments.size, None, threads=os.cpu_count() or 1)
        print(json.dumps(_measure(path, arguments.res, arguments.repeats)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", type=Path, help="a slide file; default: a synthetic one")
    parser.add_argument("--size", type=int, default=10240, help="side of the synthetic slide")
    parser.add_argument("--res", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def _measure(path: Path, res: int, repeats: int) -> dict[str, object]:
    info = slide_info(path)
    frame = plan_frame(info, res, "resize", None, None)
    level = best_level(info.level_downsamples, frame.scale)
    raw_s, read_s = [], []
    for repeat in range(repeats + 1):
        raw_s.append(_timed(lambda: _read_raw(path, level)))
        read_s.append(_timed(lambda: read_slide(path, res)))
        print(f"repeat {repeat}: raw {raw_s[-1]:.2f} s, read_slide {read_s[-1]:.2f} s")
    raw, read = (statistics.median(times[1:]) for times in (raw_s, read_s))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak_extra_bytes = pool.apply(_peak_extra_bytes, (path, res))
    return {
        "slide": f"{info.width_px}x{info.height_px}",
        "res": res,
        "level": level,
        "raw_s": round(raw, 3),
        "read_s": round(read, 3),
        "ratio": round(read / raw, 3),
        "image_bytes": res * res * 3,
        "peak_extra_bytes": peak_extra_bytes,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read_raw(path: Path, level: int) -> None:
    with openslide.OpenSlide(path) as slide:
        width, height = slide.level_dimensions[level]
        downsample = slide.level_downsamples[level]
        for row in range(0, height, RAW_STRIP_ROWS):
            rows = min(RAW_STRIP_ROWS, height - row)
            slide.read_region((0, round(row * downsample)), level, (width, rows))


def _peak_extra_bytes(path: Path, res: int) -> int:
    before = _status_bytes("VmRSS")
    read_slide(path, res)
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux")


if __name__ == "__main__":
    main()
