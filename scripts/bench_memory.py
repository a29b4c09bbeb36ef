"""The talk's table: images/s by resolution and memory strategy, with peak memory.

Modes:
  table      rows 256, 512, 768, 1024; columns vDNN, LMS, vanilla UM, grouping (B),
             grouping (E), + prefetch, checkpoint, vanilla. JSON and PNG beside it.
  compare    LMS and + prefetch against vanilla, all three alive and taking turns step by step.
  smallest   the smallest device budget, to 32 MiB, under which each strategy still runs a step.
  paging     um against um_group_prefetch under one device budget that makes both page to disk,
             and, with --cgroup DIR (memory and blkio cgroups that you may write to), under a
             hard limit; with the speed of the spill disk there (mode `disk`).
  timelines  what lms, um and um_group_prefetch move when, one below the other: --out PNG.
  allocator  vanilla with freed buffers' pages pooled as in training, kept in glibc's heap, as
             glibc does by itself, and given back.

Method: each cell is a process of its own; warm-up steps are left out; images/s is the mean over
steps ± their standard deviation. Strategies take turns, in rounds that start at another one each
time, and are compared within a round, so that what else the machine does falls on all of them. A
synthetic batch stays in memory, so nothing but the step is measured. Cells that run out of memory
say OOM. Prints a table; the last line of output is one JSON document.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cells import run_cell_process, write_document

COLUMNS = {
    "vDNN": ("vdnn", {}),
    "LMS": ("lms", {}),
    "vanilla UM": ("um", {}),
    "grouping (B)": ("um_group", {"grouping": "blocks"}),
    "grouping (E)": ("um_group", {"grouping": "equal"}),
    "+ prefetch": ("um_group_prefetch", {}),
    "checkpoint": ("checkpoint", {}),
    "vanilla": ("vanilla", {}),
}
POOL = "POOL"
COMPARED = ("vanilla", "lms", "um_group_prefetch")
SMALLEST_STEP_BYTES = 32 * 2**20
STRATEGIES = ("vanilla", "vdnn", "lms", "um", "um_group", "um_group_prefetch", "checkpoint")


def run_cell(arguments: argparse.Namespace) -> dict[str, object]:
    """Train a few steps in this process and return the figures."""
    import torch

    from umtrain import memory, models
    from umtrain.errors import OutOfMemoryError
    from umtrain.memory.allocator import FreedBuffers, recycle_large_buffers, set_freed_buffers

    if arguments.freed_buffers == POOL:
        recycle_large_buffers(arguments.device)
    else:
        set_freed_buffers(FreedBuffers[arguments.freed_buffers])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    is_bf16 = arguments.precision == "bf16"
    torch.manual_seed(0)
    model = models.create(arguments.model, in_channels=3, n_outputs=2).to(device)
    model = model.to(memory_format=torch.channels_last)
    batch = torch.randn(arguments.batch_size, 3, arguments.res, arguments.res, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    options = json.loads(arguments.options)
    strategy = memory.create(arguments.strategy, device=device, **options)
    times_s = []
    try:
        with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
            strategy.prepare(model, batch)
        for _ in turns(arguments):
            start_s = time.perf_counter()
            optimizer.zero_grad()
            with strategy.step():
                with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
                    output = model(batch)
                output.float().square().mean().backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - start_s)
    except OutOfMemoryError as error:
        return {"status": "oom", "why": str(error)}
    finally:
        strategy.close()
    return {
        "status": "ok",
        **rates_of(times_s[arguments.warm_up :], arguments.batch_size),
        **figures_of(strategy),
    }


def turns(arguments: argparse.Namespace) -> Iterator[None]:
    """Yield once a step: at once, or as the parent gives the turn and is told when it is over."""
    for _ in range(arguments.warm_up + arguments.steps):
        if arguments.waits:
            sys.stdin.readline()
        yield
        if arguments.waits:
            print("done", flush=True)


def rates_of(times_s: list[float], batch_size: int) -> dict[str, object]:
    rates = [batch_size / step_s for step_s in times_s]
    return {"images_per_s": spread(rates), "rates": rates}


def spread(values: list[float]) -> dict[str, object]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "n": len(values)}


def figures_of(strategy: object) -> dict[str, object]:
    from dataclasses import asdict

    return {"memory_use": asdict(strategy.stats())}


def in_process_of_its_own(
    arguments: argparse.Namespace, prefix: tuple[str, ...] = (), **changes: object
) -> dict[str, object]:
    """Run one cell in a fresh process; a process that the system kills is out of memory."""
    return run_cell_process(cell_command(arguments, prefix, **changes))


def cell_command(
    arguments: argparse.Namespace, prefix: tuple[str, ...] = (), **changes: object
) -> list[str]:
    values = vars(arguments) | changes
    command = [*prefix, *shlex.split(arguments.prefix), sys.executable, __file__, "cell"]
    for key in (
        "strategy",
        "res",
        "steps",
        "warm_up",
        "batch_size",
        "model",
        "precision",
        "device",
        "threads",
    ):
        command += [f"--{key.replace('_', '-')}", str(values[key])]
    command += ["--freed-buffers", str(values["freed_buffers"])]
    options = changes.get("options", {})
    return [*command, "--options", json.dumps(options)]


def budget_options(arguments: argparse.Namespace) -> dict[str, object]:
    return {"device_budget": arguments.device_budget} if arguments.device_budget else {}


def table(arguments: argparse.Namespace) -> dict[str, object]:
    document = {"mode": "table", "rounds": arguments.rounds, **machine(arguments)}
    document["rows"] = other_rows(arguments, "res", arguments.resolutions)
    for res in arguments.resolutions:
        cells = measure_in_turn(arguments, res)
        for column in COLUMNS:
            row = {"res": res, "column": column, "memory": COLUMNS[column][0]}
            document["rows"].append(row | united(cells[column], cells["vanilla"]))
        document["rows"].sort(key=lambda row: row["res"])
        write(document, arguments.out)
    return document


def other_rows(
    arguments: argparse.Namespace, key: str, measured: Sequence[object]
) -> list[dict[str, object]]:
    """Return the other rows that an earlier run left in --out: it may be measured in parts."""
    if arguments.out is None or not arguments.out.with_suffix(".json").exists():
        return []
    before = json.loads(arguments.out.with_suffix(".json").read_text())
    same = ("model", "precision", "batch_size", "device", "device_budget", "threads", "torch")
    if any(before[key] != value for key, value in machine(arguments).items() if key in same):
        sys.exit(f"--out {arguments.out}: holds a table of other settings; name another file")
    return [row for row in before["rows"] if row[key] not in measured]


def measure_in_turn(arguments: argparse.Namespace, res: int) -> dict[str, list[dict[str, object]]]:
    """Return each column's cells, one a round."""
    cells: dict[str, list[dict[str, object]]] = {column: [] for column in COLUMNS}
    names = list(COLUMNS)
    for turn in range(arguments.rounds):
        first = turn * len(names) // arguments.rounds
        for column in names[first:] + names[:first]:
            strategy, options = COLUMNS[column]
            cell = in_process_of_its_own(
                arguments, strategy=strategy, res=res, options=options | budget_options(arguments)
            )
            cells[column].append(cell)
            print(f"{res:5} {column:13} {cell_text(cell)}", flush=True)
    return cells


def united(cells: list[dict[str, object]], vanilla: list[dict[str, object]]) -> dict[str, object]:
    """Return one row of all rounds; the first round that failed stands for its column."""
    failed = next((cell for cell in cells if cell["status"] != "ok"), None)
    if failed is not None:
        return failed
    return {
        "status": "ok",
        "images_per_s": spread([rate for cell in cells for rate in cell["rates"]]),
        "over_vanilla": ratios_of(cells, vanilla),
        "memory_use": cells[-1]["memory_use"],
    }


def ratios_of(cells: list[dict[str, object]], others: list[dict[str, object]]) -> dict[str, object]:
    """Return how much faster `cells` are than `others`, round by round, and the median."""
    pairs = zip(cells, others, strict=True)
    ratios = [rate_of(a) / rate_of(b) for a, b in pairs if rate_of(b)]
    return {"median": statistics.median(ratios) if ratios else None, "rounds": ratios}


def cell_text(cell: dict[str, object]) -> str:
    if cell["status"] != "ok":
        return f"{cell['status']:>15}  {cell['why']}"
    rate, use = cell["images_per_s"], cell["memory_use"]
    deviation = "" if rate["std"] is None else f" ± {rate['std']:.3f}"
    peak = use["device_peak_bytes"] / 2**30
    host = use["host_peak_bytes"] / 2**30
    return f"{rate['mean']:.3f}{deviation} images/s, device {peak:.2f} GiB, host {host:.2f} GiB"


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Let processes that are all alive train one step each in turn: load falls on all alike."""
    running = {
        strategy: subprocess.Popen(
            [
                *cell_command(arguments, strategy=strategy, options=budget_options(arguments)),
                "--waits",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for strategy in COMPARED
    }
    for _ in range(arguments.warm_up + arguments.steps):
        for process in running.values():
            print("go", file=process.stdin, flush=True)
            process.stdout.readline()
    cells = {
        strategy: json.loads(process.communicate()[0].splitlines()[-1])
        for strategy, process in running.items()
    }
    for strategy, cell in cells.items():
        pairs = zip(cell["rates"], cells["vanilla"]["rates"], strict=True)
        ratios = [rate / vanilla for rate, vanilla in pairs]
        cell["over_vanilla"] = {"median": statistics.median(ratios), **spread(ratios)}
        print(f"{strategy:18} {cell_text(cell)}, {cell['over_vanilla']['median']:.3f} of vanilla")
    document = {"mode": "compare", "res": arguments.res, **machine(arguments), "cells": cells}
    write(document, arguments.out)
    return document


def smallest(arguments: argparse.Namespace) -> dict[str, object]:
    rows = other_rows(arguments, "memory", arguments.strategies)
    document = {"mode": "smallest", "res": arguments.res, **machine(arguments), "rows": rows}
    for strategy in arguments.strategies:
        n_bytes = smallest_budget_bytes(arguments, strategy)
        rows.append({"memory": strategy, "smallest_device_budget_bytes": n_bytes})
        print(f"{strategy:18} {n_bytes / 2**20:7.0f} MiB", flush=True)
        write(document, arguments.out)
    return document


def smallest_budget_bytes(arguments: argparse.Namespace, strategy: str) -> int:
    """Bisect between nothing and a budget that is doubled until it does."""

    def runs_in(n_bytes: int) -> bool:
        options = {"device_budget": n_bytes}
        cell = in_process_of_its_own(
            arguments, strategy=strategy, steps=1, warm_up=0, options=options
        )
        return cell["status"] == "ok"

    too_small, enough = 0, 2**29
    while not runs_in(enough):
        too_small, enough = enough, 2 * enough
    while enough - too_small > SMALLEST_STEP_BYTES:
        middle = (too_small + enough) // 2
        too_small, enough = (too_small, middle) if runs_in(middle) else (middle, enough)
    return enough


def paging(arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate the two sides, so that a change in the machine's load falls on both."""
    prefix = tuple(word for group in arguments.cgroup for word in cgroup_prefix(group))
    done = subprocess.run([*prefix, sys.executable, __file__, "disk"], stdout=subprocess.PIPE)
    speed = json.loads(done.stdout)
    print(f"spill disk {' '.join(f'{key} {value:.2e}' for key, value in speed.items())}")
    sides: dict[str, list[dict[str, object]]] = {"um": [], "um_group_prefetch": []}
    for _ in range(arguments.rounds):
        for strategy, cells in sides.items():
            options = budget_options(arguments)
            cell = in_process_of_its_own(arguments, prefix, strategy=strategy, options=options)
            cells.append(cell)
            print(f"{strategy:18} {cell_text(cell)}", flush=True)
    document = {
        "mode": "paging",
        "prefetch_over_um": ratios_of(sides["um_group_prefetch"], sides["um"]),
        "res": arguments.res,
        "limits": {
            str(group / name): limit
            for group in arguments.cgroup
            for name, limit in limits_of(group)
        },
        "spill_disk": speed,
        **machine(arguments),
        "cells": sides,
    }
    write(document, arguments.out)
    return document


def rate_of(cell: dict[str, object]) -> float:
    return cell["images_per_s"]["mean"] if cell["status"] == "ok" else 0.0


def cgroup_prefix(directory: Path) -> tuple[str, ...]:
    """Return the command that enters a memory cgroup; the limit in it is the user's to set."""
    entry = directory / "cgroup.procs"
    if not os.access(entry, os.W_OK):
        sys.exit(f"--cgroup {directory}: {entry} is not a file that you may write to")
    return ("sh", "-c", f'echo $$ > "{entry}" && exec "$@"', "sh")


def timelines(arguments: argparse.Namespace) -> dict[str, object]:
    """Draw the last step of each strategy's trace on one scale of time."""
    from umtrain.memory.timeline import draw_timelines, last_step, read_trace

    steps, cells = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("lms", "um", "um_group_prefetch"):
            trace = Path(folder) / strategy
            options = budget_options(arguments) | {"trace": str(trace)}
            cell = in_process_of_its_own(arguments, strategy=strategy, options=options)
            cells[strategy] = cell
            print(f"{strategy:18} {cell_text(cell)}", flush=True)
            if cell["status"] == "ok":
                steps[f"memory={strategy}"] = last_step(read_trace(trace / "trace.json"))
    if arguments.out is not None and steps:
        draw_timelines(steps, arguments.out.with_suffix(".png"))
    document = {"mode": "timelines", "res": arguments.res, **machine(arguments), "cells": cells}
    write(document, arguments.out)
    return document


def limits_of(cgroup: Path) -> list[tuple[str, str]]:
    """Return the limits that are set in a cgroup, by the names of their files."""
    names = ("memory.limit_in_bytes", "memory.max", "io.max")
    names += tuple(f"blkio.throttle.{way}_bps_device" for way in ("read", "write"))
    texts = [(name, (cgroup / name)) for name in names]
    return [(name, path.read_text().strip()) for name, path in texts if path.exists()]


def disk(arguments: argparse.Namespace) -> dict[str, object]:
    """Write 512 MiB to the folder of spill files, drop them from RAM, and read them again."""
    n_bytes, chunk = 2**29, os.urandom(2**24)
    with tempfile.TemporaryFile() as file:
        start_s = time.perf_counter()
        for _ in range(n_bytes // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fdatasync(file.fileno())
        write_s = time.perf_counter() - start_s
        os.posix_fadvise(file.fileno(), 0, n_bytes, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start_s = time.perf_counter()
        while file.read(len(chunk)):
            pass
        read_s = time.perf_counter() - start_s
    return {"write_bytes_per_s": n_bytes / write_s, "read_bytes_per_s": n_bytes / read_s}


def allocator(arguments: argparse.Namespace) -> dict[str, object]:
    rows = []
    for choice in (POOL, "RECYCLE", "GLIBC", "GIVE_BACK"):
        cell = in_process_of_its_own(arguments, strategy="vanilla", freed_buffers=choice)
        rows.append({"freed_buffers": choice, **cell})
        print(f"{choice:10} {cell_text(cell)}", flush=True)
    document = {"mode": "allocator", "res": arguments.res, **machine(arguments), "rows": rows}
    write(document, arguments.out)
    return document


def machine(arguments: argparse.Namespace) -> dict[str, object]:
    import platform

    import torch

    return {
        "model": arguments.model,
        "precision": arguments.precision,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "device_budget": arguments.device_budget,
        "threads": arguments.threads or os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def write(document: dict[str, object], out: Path | None) -> None:
    write_document(document, out)
    if out is not None and document["mode"] == "table":
        draw(document, out.with_suffix(".png"))


def draw(document: dict[str, object], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, memory_use) = plt.subplots(
        2, 1, figsize=(13, 8), sharex=True, constrained_layout=True
    )
    rows = document["rows"]
    resolutions = list(dict.fromkeys(row["res"] for row in rows))
    width = 0.9 / len(COLUMNS)
    for index, column in enumerate(COLUMNS):
        for place, res in enumerate(resolutions):
            (row,) = (row for row in rows if (row["res"], row["column"]) == (res, column))
            at = place - 0.45 + (index + 0.5) * width
            if row["status"] == "ok":
                draw_cell(speed, memory_use, row, at, width, f"C{index}")
            else:
                speed.text(at, 0.02, row["status"].upper(), rotation=90, ha="center")
        speed.bar([0], [0], color=f"C{index}", label=column)
    speed.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    speed.set_ylabel("speed over vanilla's of the same round\n(median, range; text: images/s)")
    memory_use.set_ylabel("peak memory, GiB\n(pale: swapped out or mapped)")
    memory_use.set_xticks(range(len(resolutions)), [f"{res} px" for res in resolutions])
    budget = document["device_budget"] or "all there is"
    speed.set_title(
        f"{document['model']}, {document['precision']}, batch {document['batch_size']}, "
        f"device budget: {budget} ({document['machine']})"
    )
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_cell(
    speed: object, memory_use: object, row: dict[str, object], at: float, width: float, colour: str
) -> None:
    """Draw one strategy at one resolution: without vanilla beside it, images/s alone."""
    rate, use, ratios = row["images_per_s"]["mean"], row["memory_use"], row["over_vanilla"]
    top = ratios["median"]
    if top is not None:
        below, above = top - min(ratios["rounds"]), max(ratios["rounds"]) - top
        speed.bar(at, top, width, yerr=[[below], [above]], color=colour, error_kw={"lw": 0.8})
    speed.text(at, 0.03, f"{rate:.3g}", rotation=90, ha="center", va="bottom", fontsize=8)
    device, host = use["device_peak_bytes"] / 2**30, use["host_peak_bytes"] / 2**30
    memory_use.bar(at, device, width, color=colour)
    memory_use.bar(at, host, width, bottom=device, color=colour, alpha=0.35)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "mode",
        choices=(
            "table",
            "compare",
            "smallest",
            "paging",
            "timelines",
            "disk",
            "allocator",
            "cell",
        ),
    )
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--res", type=int, default=1024)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--prefix", default="", help="command that starts each cell, e.g. 'taskset -c 0,1'"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--device-budget", help="for all strategies, e.g. 1.25GiB")
    parser.add_argument(
        "--cgroup", type=Path, nargs="+", default=[], help="cgroups (v1 or v2) to run in"
    )
    parser.add_argument("--out", type=Path, help="where to write .json and .png")
    parser.add_argument("--strategy", default="vanilla", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--waits", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--freed-buffers", default=POOL, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    modes = {
        "table": table,
        "compare": compare,
        "smallest": smallest,
        "paging": paging,
        "timelines": timelines,
        "disk": disk,
        "allocator": allocator,
        "cell": run_cell,
    }
    print(json.dumps(modes[arguments.mode](arguments)))


if __name__ == "__main__":
    main()
