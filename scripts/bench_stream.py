"""The streaming engine against ordinary training: seconds a step and peak memory, by resolution.

Modes:
  compare    at one resolution, in turns: stock PyTorch, ordinary training with recycled buffers,
             torch.utils.checkpoint over the network's blocks, and streaming, with all the memory
             there is and under --budgets. Ratios to stock PyTorch, round by round.
  curve      streaming alone at several resolutions (512 to 10000), ordinary training beside it
             while it fits. JSON and PNG beside it.
  frozen     as compare, with frozen norms, and lightstream beside it if it is installed.

Method: each figure is a process of its own that trains ResNet-50, batch 1, channels-last, on one
random image in memory. The first step (on a GPU, three) is left out where more are made. Peak
memory is the largest resident set of the steps, less what the process held before the model; `rss`
is all of it. On a GPU it is what torch's allocator held.
Prints a table; the last line of output is one JSON document.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cells import run_cell_process, write_document

if TYPE_CHECKING:
    from torch import Tensor, nn

# The strategy, and whether freed buffers are used again as in training.
SIDES = {
    "stock": ("vanilla", False),
    "vanilla": ("vanilla", True),
    "checkpoint": ("checkpoint", True),
    "lms": ("lms", True),
    "stream": ("stream", True),
}
LIGHTSTREAM = "lightstream"  # pip install --no-deps lightstream==1.0.7
LARGEST_ORDINARY_RES = 3000
N_LEFT_OUT = {"cpu": 1, "cuda": 3}  # on a GPU the second step of streaming is recorded


def cell(arguments: argparse.Namespace) -> dict[str, object]:
    """Train a few steps in this process and return the figures."""
    import torch

    from umtrain import memory, models
    from umtrain.errors import OutOfMemoryError
    from umtrain.memory.allocator import recycle_large_buffers

    is_lightstream = arguments.side == LIGHTSTREAM
    strategy_name, recycles = SIDES["vanilla" if is_lightstream else arguments.side]
    if recycles:
        recycle_large_buffers(arguments.device)
    device, res = arguments.device, arguments.res
    is_bf16 = arguments.precision == "bf16"
    torch.manual_seed(0)
    norm = "frozen" if arguments.frozen else "batch"
    model = models.create(arguments.model, in_channels=3, n_outputs=2, norm=norm).to(device)
    model = model.to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    image = torch.empty(1, 3, res, res, dtype=dtype, device=device).normal_()
    image = image.contiguous(memory_format=torch.channels_last)
    budgets = {"device_budget": arguments.budget, "host_budget": arguments.host_budget}
    budgets = {key: value for key, value in budgets.items() if value}
    strategy = memory.create(strategy_name, device=device, **budgets)
    times_s: list[float] = []
    try:
        with autocast(arguments):
            strategy.prepare(model, image)
        step = tiled_step(model, arguments) if is_lightstream else whole_step(model, arguments)
        for _ in range(arguments.steps):
            start_s = time.perf_counter()
            with strategy.step():
                step(image)
            model.zero_grad(set_to_none=False)
            if device == "cuda":
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - start_s)
    except OutOfMemoryError as error:
        return {"status": "oom", "why": str(error)}
    finally:
        strategy.close()
    timed = times_s[N_LEFT_OUT[device] :] or times_s
    return {
        "status": "ok",
        "step_s": statistics.median(timed),
        "all_steps_s": times_s,
        "memory_use": asdict(strategy.stats()),
    }


def autocast(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    import torch

    is_bf16 = arguments.precision == "bf16"
    return torch.autocast(arguments.device, torch.bfloat16, enabled=is_bf16)


def whole_step(model: "nn.Module", arguments: argparse.Namespace) -> "Callable[[Tensor], None]":
    """Return ordinary forward and backward, which strategies hook into."""

    def step(image: "Tensor") -> None:
        with autocast(arguments):
            output = model(image)
        output.float().square().mean().backward()

    return step


def tiled_step(model: "nn.Module", arguments: argparse.Namespace) -> "Callable[[Tensor], None]":
    """Return lightstream's: all up to the last feature map in tiles, the rest whole."""
    from lightstream.core.constructor import StreamingConstructor
    from torch import nn

    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    trunk = nn.Sequential(*(getattr(model, name) for name in names)).eval()
    keep = [type(model.bn1)]
    constructor = StreamingConstructor(
        trunk, arguments.tile, verbose=False, normalize_on_gpu=False, add_keep_modules=keep
    )
    constructor.statistics_on_cpu = False  # it would move the network to a GPU afterwards
    with contextlib.redirect_stdout(sys.stderr):
        tiled = constructor.prepare_streaming_model()

    def step(image: "Tensor") -> None:
        with autocast(arguments):
            features = tiled.forward(image).detach().requires_grad_()
            output = model.fc(model.avgpool(features).flatten(1))
        output.float().square().mean().backward()
        with autocast(arguments):
            tiled.backward(image, features.grad)

    return step


def in_process_of_its_own(arguments: argparse.Namespace, **changes: object) -> dict[str, object]:
    """Run one cell in a fresh process; a process that the system kills is out of memory."""
    values = vars(arguments) | changes
    command = [sys.executable, __file__, "cell"]
    for key in ("side", "res", "steps", "precision", "device", "model", "tile"):
        command += [f"--{key}", str(values[key])]
    for key in ("budget", "host_budget"):
        if values.get(key):
            command += [f"--{key.replace('_', '-')}", str(values[key])]
    if values["frozen"]:
        command.append("--frozen")
    return run_cell_process(command)


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Take turns, so that a change in the machine's load falls on all sides."""
    sides = [(side, None) for side in SIDES if side != "lms"] + [
        ("stream", b) for b in arguments.budgets
    ]
    if arguments.frozen and importlib.util.find_spec(LIGHTSTREAM):
        sides.append((LIGHTSTREAM, None))
    rounds: dict[str, list[dict[str, object]]] = {label(*side): [] for side in sides}
    for _ in range(arguments.rounds):
        for side, budget in sides:
            figures = in_process_of_its_own(arguments, side=side, budget=budget)
            rounds[label(side, budget)].append(figures)
            print(f"{label(side, budget):18} {text(figures)}", flush=True)
    return {"mode": arguments.mode, "res": arguments.res, "rounds": rounds, **ratios(rounds)}


def label(side: str, budget: str | None) -> str:
    return f"{side} in {budget}" if budget else side


def ratios(rounds: dict[str, list[dict[str, object]]]) -> dict[str, object]:
    """Return time and peak memory over those of stock PyTorch: medians of the rounds' ratios."""
    result = {}
    for name, cells in rounds.items():
        pairs = [
            (one, stock)
            for one, stock in zip(cells, rounds["stock"], strict=True)
            if one["status"] == stock["status"] == "ok"
        ]
        if pairs:
            result[name] = {
                "time": statistics.median(a["step_s"] / b["step_s"] for a, b in pairs),
                "memory": statistics.median(peak(a) / peak(b) for a, b in pairs),
            }
            print(
                f"{name:18} {result[name]['time']:.2f} of stock's time, "
                f"{result[name]['memory']:.2f} of its memory",
                flush=True,
            )
    return {"over_stock": result}


def peak(figures: dict[str, object]) -> int:
    return figures["memory_use"]["device_peak_bytes"]


def text(figures: dict[str, object]) -> str:
    if figures["status"] != "ok":
        return f"{figures['status']}: {figures['why']}"
    use = figures["memory_use"]
    rss = "" if use["rss_peak_bytes"] is None else f", rss {use['rss_peak_bytes'] / 2**30:.2f} GiB"
    host = use["host_peak_bytes"] or 0
    return (
        f"{figures['step_s']:8.2f} s, peak {peak(figures) / 2**30:6.2f} GiB{rss}, "
        f"host {host / 2**30:.2f} GiB"
    )


def curve(arguments: argparse.Namespace) -> dict[str, object]:
    rows = []
    for res in arguments.resolutions:
        for side in arguments.sides:
            if side == "stock" and res > arguments.largest_ordinary_res:
                continue
            budget = arguments.budget if side == "stream" else None
            is_long = arguments.device == "cpu" and res > LARGEST_ORDINARY_RES
            steps = 1 if is_long else arguments.steps
            figures = in_process_of_its_own(
                arguments, side=side, res=res, budget=budget, steps=steps
            )
            rows.append({"res": res, "side": side, **figures})
            print(f"{res:6} {side:8} {text(figures)}", flush=True)
    return {"mode": "curve", "rows": rows}


def draw(document: dict[str, object], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    sides = dict.fromkeys(row["side"] for row in document["rows"])
    for side in sides:
        name = "stock PyTorch" if side == "stock" else f"memory={side}"
        rows = [r for r in document["rows"] if r["side"] == side and r["status"] == "ok"]
        sizes = [row["res"] for row in rows]
        panels[0].plot(sizes, [row["step_s"] for row in rows], "o-", label=name)
        panels[1].plot(sizes, [peak(row) / 2**30 for row in rows], "o-", label=name)
    for panel, what in zip(panels, ("seconds a step", "peak memory, GiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="resolution, px", title=what)
        ticks = sorted({row["res"] for row in document["rows"]})
        panel.set_xticks(ticks, [str(res) for res in ticks], rotation=45)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"{document['model']}, {document['precision']}, {document['machine']}")
    figure.savefig(path, dpi=120)


def machine(arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from umtrain.device import device_name

    return {
        "model": arguments.model,
        "precision": arguments.precision,
        "frozen_norms": arguments.frozen,
        "machine": f"{device_name(torch.device(arguments.device))}, {os.cpu_count()} cores",
        "load_1min": os.getloadavg()[0],
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("compare", "curve", "frozen", "cell"))
    parser.add_argument("--res", type=int, default=2048)
    parser.add_argument(
        "--resolutions", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 10000]
    )
    parser.add_argument("--largest-ordinary-res", type=int, default=LARGEST_ORDINARY_RES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budgets", nargs="*", default=[], help="for compare, e.g. 768MiB")
    parser.add_argument("--budget", help="memory.device_budget of streaming, e.g. 8GiB")
    parser.add_argument("--host-budget", help="memory.host_budget, e.g. 100GiB")
    parser.add_argument("--sides", nargs="+", default=["stock", "stream"], help="for curve")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--frozen", action="store_true", help="frozen norms")
    parser.add_argument("--tile", type=int, default=1600, help="side of lightstream's tiles")
    sides = (*SIDES, LIGHTSTREAM)
    parser.add_argument("--out", type=Path, help="where to write .json and, for curve, .png")
    parser.add_argument("--side", choices=sides, default="stream", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.mode == "cell":
        print(json.dumps(cell(arguments)))
        return
    arguments.frozen = arguments.frozen or arguments.mode == "frozen"
    run = curve if arguments.mode == "curve" else compare
    document = {**machine(arguments), **run(arguments)}
    write_document(document, arguments.out)
    if arguments.out is not None and arguments.mode == "curve":
        draw(document, arguments.out.with_suffix(".png"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
