"""The planner's predictions against measurements here, and beside the talk's published figures.

Modes:
  measured   predicted against measured peak device memory and step time on this machine: ResNet-50,
             ResNet-101 and ResUNet35 at 256 to 2048 under each memory strategy. One process a
             measured cell; what --out's JSON already holds is kept, so it can be run in parts.
  talk       the v100_32gb profile's predictions beside the talk's figures, with the deviation.
  h100       the h100_80gb profile's predictions beside what scripts/bench_stream.py curve measured
             on an H100 (scripts/results/stream_h100.json). The profile's efficiencies were fitted
             to the times of stock PyTorch there; memory and streaming were not.

Method: a measured cell is `python -m umtrain.trial`, which trains as `umtrain fit` does, on noise;
--steps steps or more, for --seconds at least (the first second of a process is slower than the
rest of a run); the first step is left out and the median of the rest is taken. A prediction never
sees a measured cell: it comes from the trace of a step and a profile (`umtrain plan
calibrate=true`).
Prints tables; the last line of output is one JSON document. --out writes it, with a picture.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cells import write_document

if TYPE_CHECKING:
    from umtrain.plan_subject import Planned

STRATEGIES = (
    "vanilla",
    "checkpoint",
    "vdnn",
    "lms",
    "um",
    "um_group",
    "um_group_prefetch",
    "stream",
)
MODELS = {
    "resnet50": ("dataset=wsi", "model=resnet50"),
    "resnet101": ("dataset=wsi", "model=resnet101"),
    "resunet35": ("dataset=spine",),
}
WANTED = {"device_peak_bytes": 0.10, "step_s": 0.25}
GIB = 2**30

# "No Compromise Using Unified Memory for High Resolution Medical Image AI": ResNet-101 on one V100
# 32GB, images/s by resolution.
TALK_RATES = {
    "lms": ("lms", {}, (161.0, 46.0, 21.1, 8.0)),
    "UM": ("um", {}, (243.0, 65.6, 14.2, 2.01)),
    "grouping (B)": ("um_group", {"grouping": "blocks"}, (215.0, 64.2, 15.3, 2.02)),
    "grouping (E)": ("um_group", {"grouping": "equal"}, (214.0, 63.1, 16.7, 2.39)),
}
TALK_RES = (256, 512, 768, 1024)
TALK_PREFETCH = (1.4, 2.5)  # times um_group


def measured(arguments: argparse.Namespace) -> dict[str, object]:
    """Predict and measure each cell that is asked for; keep what is there."""
    from umtrain.trial import run_trial

    rows = kept_rows(arguments)
    for model, precision, res, strategy in cells(arguments):
        key = {"model": model, "precision": precision, "res": res, "strategy": strategy}
        key["budget"] = arguments.budget
        row = next((r for r in rows if all(r[k] == v for k, v in key.items())), None)
        if row is None:
            overrides = [*overrides_of(model, precision, res, arguments), f"memory={strategy}"]
            outcome = run_trial(overrides, arguments.steps, arguments.seconds)
            row = {**key, "measured": figures_of(outcome)}
            rows.append(row)
        row["predicted"] = predicted_figures(model, precision, res, strategy, arguments)
        row["deviation"] = deviations(row)
        print(row_text(row), flush=True)
        write_document(document_of(arguments, rows), arguments.out)
    document = document_of(arguments, rows)
    print(summary_text(document["summary"]))
    if arguments.out is not None:
        draw(document, arguments.out)
    return document


def kept_rows(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return the cells that --out holds, unless another machine or version measured them."""
    if arguments.out is None or not arguments.out.with_suffix(".json").exists():
        return []
    before = json.loads(arguments.out.with_suffix(".json").read_text())
    for key, value in machine(arguments.device).items():
        if before[key] != value:
            sys.exit(f"--out {arguments.out}: {key} was {before[key]}; name another file")
    return before["rows"]


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, str]]:
    for precision in arguments.precisions:
        for model in arguments.models:
            for res in arguments.resolutions:
                for strategy in arguments.memories:
                    yield model, precision, res, strategy


def overrides_of(model: str, precision: str, res: int, arguments: argparse.Namespace) -> list[str]:
    words = [*MODELS[model], f"res={res}", f"precision={precision}"]
    words.append(f"device={arguments.device}")
    return [*words, f"memory.device_budget={arguments.budget}"] if arguments.budget else words


def figures_of(outcome: dict[str, object]) -> dict[str, object]:
    if outcome["status"] != "ok":
        return outcome
    use = outcome["memory_use"]
    return {
        "status": "ok",
        "step_s": outcome["step_s"],
        "steps_s": outcome["steps_s"],
        "device_peak_bytes": use["device_peak_bytes"],
        "host_peak_bytes": use["host_peak_bytes"],
        "swapped_out_bytes": use["swapped_out_bytes"],
        "swapped_in_bytes": use["swapped_in_bytes"],
    }


def predicted_figures(
    model: str, precision: str, res: int, strategy: str, arguments: argparse.Namespace
) -> dict[str, object]:
    from umtrain.memory.allocator import recycle_large_buffers
    from umtrain.memory.options import Options
    from umtrain.planning.machine import free_profile
    from umtrain.planning.predict import predict

    recycle_large_buffers(arguments.device)
    words = overrides_of(model, precision, res, arguments)
    planned = planned_here(tuple(words), arguments.device)
    profile = free_profile(Options.parse(device=arguments.device))
    return dataclasses.asdict(predict(planned.subject, strategy, profile, planned.options))


@lru_cache(maxsize=1)
def planned_here(words: tuple[str, ...], device: str) -> "Planned":
    """Return the step of a configuration on this machine; its trace serves every strategy."""
    from umtrain.config import load_config
    from umtrain.memory.options import Options
    from umtrain.plan_subject import make_planned
    from umtrain.planning.machine import free_profile

    return make_planned(load_config(list(words)), free_profile(Options.parse(device=device)))


def deviations(row: dict[str, object]) -> dict[str, float | None]:
    """Return by how much of the measured figure each predicted one is off."""
    predicted, real = row["predicted"], row["measured"]
    return {
        key: predicted[key] / real[key] - 1 if real.get(key) and predicted.get(key) else None
        for key in (*WANTED, "host_peak_bytes")
    }


def row_text(row: dict[str, object]) -> str:
    name = f"{row['model']:9} {row['precision']} {row['res']:5} {row['strategy']:17}"
    real, predicted = row["measured"], row["predicted"]
    if real["status"] != "ok":
        return f"{name} measured: {real['status']}; predicted to fit: {predicted['fits']}"
    off = row["deviation"]
    return (
        f"{name} memory {figure(predicted['device_peak_bytes'], GIB)} for "
        f"{figure(real['device_peak_bytes'], GIB)} GiB ({percent(off['device_peak_bytes'])}), step "
        f"{figure(predicted['step_s'])} for {figure(real['step_s'])} s ({percent(off['step_s'])})"
    )


def figure(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.3g}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.0%}"


def document_of(arguments: argparse.Namespace, rows: list[dict[str, object]]) -> dict[str, object]:
    return {
        "mode": "measured",
        **machine(arguments.device),
        "command": " ".join(sys.argv),
        "summary": summary(rows),
        "rows": rows,
    }


def summary(rows: list[dict[str, object]]) -> dict[str, object]:
    """Return per figure how many cells are as near as is wanted, and the worst."""
    result = {}
    for key, wanted in WANTED.items():
        offs = [row["deviation"][key] for row in rows if row["deviation"][key] is not None]
        if not offs:
            continue
        sizes = [abs(off) for off in offs]
        result[key] = {
            "wanted": wanted,
            "n": len(offs),
            "n_within": sum(size <= wanted for size in sizes),
            "median": statistics.median(sizes),
            "worst": max(sizes),
        }
    return result


def summary_text(result: dict[str, object]) -> str:
    lines = []
    for key, s in result.items():
        lines.append(
            f"{key}: {s['n_within']} of {s['n']} cells within {s['wanted']:.0%}; "
            f"median {s['median']:.0%}, worst {s['worst']:.0%}"
        )
    return "\n".join(lines)


def machine(device: str) -> dict[str, object]:
    import torch

    from umtrain.device import device_name

    title = device_name(torch.device(device))
    n_cores = len(os.sched_getaffinity(0))
    return {
        "machine": f"{title}, {n_cores} cores" if device == "cpu" else title,
        "torch": torch.__version__,
    }


def draw(document: dict[str, object], out: Path) -> None:
    """Draw a picture for each model and precision: predicted lines, measured points."""
    from umtrain.report.plots_plan import plan_plot

    rows = document["rows"]
    sets = list(dict.fromkeys((row["model"], row["precision"]) for row in rows))
    for model, precision in sets:
        mine = [r for r in rows if (r["model"], r["precision"]) == (model, precision)]
        predicted = [{**r["predicted"], "res": r["res"]} for r in mine]
        points = [
            {**r["measured"], "res": r["res"], "strategy": r["strategy"]}
            for r in mine
            if r["measured"]["status"] == "ok"
        ]
        title = f"{model}, {precision}, batch 1, {document['machine']}: predicted and measured"
        suffix = "" if len(sets) == 1 else f"_{model}_{precision}"
        plan_plot(out.with_name(f"{out.stem}{suffix}.png"), predicted, title, points)


def talk(arguments: argparse.Namespace) -> dict[str, object]:
    """Put predictions for a V100 beside what the talk says, under each assumption."""
    document: dict[str, object] = {"mode": "talk", "command": " ".join(sys.argv)}
    document["limits"] = talk_limits()
    document["rates"] = talk_rates(arguments)
    document["slide"] = talk_slide()
    write_document(document, arguments.out)
    return document


H100_RESULTS = Path(__file__).parent / "results" / "stream_h100.json"


def h100(arguments: argparse.Namespace) -> dict[str, object]:
    """Put predictions beside measurements that were made on an H100."""
    before = json.loads(H100_RESULTS.read_text())
    rows = []
    for cell in before["rows"]:
        if cell["status"] != "ok":
            continue
        strategy = "vanilla" if cell["side"] == "stock" else cell["side"]
        words = ("dataset=wsi", f"model={before['model']}", f"precision={before['precision']}")
        planned = planned_for("h100_80gb", *words, f"res={cell['res']}")
        row = {
            "model": before["model"],
            "precision": before["precision"],
            "res": cell["res"],
            "strategy": strategy,
            "measured": figures_of({"steps_s": cell["all_steps_s"], **cell}),
            "predicted": dataclasses.asdict(predict_for(planned, strategy)),
        }
        row["deviation"] = deviations(row)
        rows.append(row)
        print(row_text(row), flush=True)
    document = {"mode": "h100", "machine": before["machine"], "torch": before["torch"]}
    document |= {"command": " ".join(sys.argv), "summary": summary(rows), "rows": rows}
    print(summary_text(document["summary"]))
    write_document(document, arguments.out)
    if arguments.out is not None:
        draw(document, arguments.out)
    return document


def planned_for(profile_name: str, *words: str):
    from umtrain.config import load_config
    from umtrain.plan_subject import make_planned
    from umtrain.planning.profile import load_profile

    return make_planned(load_config(list(words)), load_profile(profile_name))


def predict_for(planned, strategy: str, **options: object):
    from umtrain.planning.predict import predict

    chosen = dataclasses.replace(planned.options, oversubscribe=True, **options)
    return predict(planned.subject, strategy, planned.profile, chosen)


def talk_limits() -> list[dict[str, object]]:
    """Return the largest batch at 512 x 512 and the largest res at batch 1, by prediction."""
    from umtrain.planning.limits import largest

    rows = []
    for precision in ("fp32", "bf16"):
        words = ("dataset=wsi", "model=resnet101", f"precision={precision}")

        def fits_batch(n: int, words: tuple[str, ...] = words) -> bool:
            planned = planned_for("v100_32gb", *words, "res=512", f"batch_size={n}")
            return predict_for(planned, "vanilla").fits

        def fits_res(res: int, words: tuple[str, ...] = words) -> bool:
            planned = planned_for("v100_32gb", *words, f"res={res}", "batch_size=1")
            return predict_for(planned, "vanilla").fits

        rows.append(
            {
                "precision": PRECISIONS[precision],
                "batch at 512, talk": 32,
                "batch at 512, predicted": largest(fits_batch, 1, 1, 512),
                "res at batch 1, talk": 3880,
                "res at batch 1, predicted": largest(fits_res, 128, 64, 16384),
            }
        )
        print(rows[-1], flush=True)
    return rows


PRECISIONS = {"fp32": "fp32", "bf16": "half (tensor cores)"}


def talk_rates(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return images/s under each assumption about what the talk does not say."""
    rows = []
    for precision in ("fp32", "bf16"):
        for batch_size in arguments.batch_sizes:
            planned = {
                res: planned_for(
                    "v100_32gb",
                    *("dataset=wsi", "model=resnet101", f"precision={precision}"),
                    *(f"res={res}", f"batch_size={batch_size}"),
                )
                for res in TALK_RES
            }
            for column, (strategy, options, published) in TALK_RATES.items():
                predicted = [
                    rate(predict_for(planned[res], strategy, **options), batch_size)
                    for res in TALK_RES
                ]
                rows.append(
                    {
                        "precision": PRECISIONS[precision],
                        "batch_size": batch_size,
                        "column": column,
                        "talk": list(published),
                        "predicted": predicted,
                        "deviation": [
                            None if p is None else p / t - 1
                            for p, t in zip(predicted, published, strict=True)
                        ],
                    }
                )
                print_rates(rows[-1])
            rows.append(prefetch_row(planned, precision, batch_size))
            print_rates(rows[-1])
    return rows


def prefetch_row(planned, precision: str, batch_size: int) -> dict[str, object]:
    times = []
    for res in TALK_RES:
        ahead = rate(predict_for(planned[res], "um_group_prefetch"), batch_size)
        grouped = rate(predict_for(planned[res], "um_group"), batch_size)
        times.append(None if ahead is None or grouped is None else ahead / grouped)
    return {
        "precision": PRECISIONS[precision],
        "batch_size": batch_size,
        "column": "prefetch, times grouping (B)",
        "talk": list(TALK_PREFETCH),
        "predicted": times,
        "deviation": None,
    }


def rate(prediction, batch_size: int) -> float | None:
    return None if prediction.step_s is None else batch_size / prediction.step_s


def print_rates(row: dict[str, object]) -> None:
    pairs = zip(row["predicted"], row["deviation"] or [None] * 4, strict=True)
    cells = "  ".join(f"{figure(p):>6} ({percent(off):>5})" for p, off in pairs)
    talk_text = ", ".join(f"{t:g}" for t in row["talk"])
    print(
        f"{row['precision']:20} batch {row['batch_size']:3}  {row['column']:28} predicted {cells}"
        f"   talk {talk_text}",
        flush=True,
    )


def talk_slide() -> list[dict[str, object]]:
    """Return ResNet-50 on 10000 x 10000: the talk has 360 GB of host memory and 150 s."""
    rows = []
    for precision in ("fp32", "bf16"):
        words = ("dataset=wsi", "model=resnet50", "res=10000", f"precision={precision}")
        planned = planned_for("v100_node", *words)
        for strategy in ("um", "um_group_prefetch", "lms", "stream"):
            p = predict_for(planned, strategy)
            rows.append(
                {
                    "precision": PRECISIONS[precision],
                    "strategy": strategy,
                    "host_gb_predicted": None
                    if p.host_peak_bytes is None
                    else p.host_peak_bytes / 1e9,
                    "host_gb_talk": 360,
                    "step_s_predicted": p.step_s,
                    "step_s_talk": 150,
                    "fits": p.fits,
                }
            )
            print(rows[-1], flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("measured", "talk", "h100"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--memories", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument(
        "--precisions", "--precision", nargs="+", choices=("fp32", "bf16"), default=["bf16", "fp32"]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for measured")
    parser.add_argument("--budget", help="memory.device_budget of all cells, e.g. 1GiB")
    parser.add_argument("--steps", type=int, default=4, help="the first is left out")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="more steps until these are over"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32], help="for talk")
    parser.add_argument("--out", type=Path, help="where to write .json and .png")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    modes = {"measured": measured, "talk": talk, "h100": h100}
    print(json.dumps(modes[arguments.mode](arguments)))


if __name__ == "__main__":
    main()
