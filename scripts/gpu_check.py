"""Contract and throughput of every memory strategy on a GPU; see gpu_check.sh.

Contract: each strategy against vanilla, on three networks in two precisions, with deterministic
kernels: losses, gradients and running statistics bit by bit. `vanilla` against itself is among
the rows, so that a difference that is the kernels' own is told from one of a strategy's.
`stream` adds up in another order: its gradients are compared with float64's, and may err by no more
than vanilla's do in the same precision; in float64 itself, by 1e-11. It is run as it is, recorded
as CUDA graphs from the second step on, and with all maps in pinned memory: both must give the same.
Rounding that takes a rectifier across zero changes a gradient by far more than rounding does, and
whether that happens is chance: so several draws of weights and images are judged by a sign test.
All errors are in the output.
Mechanism: see gpu_mechanism.py.
Throughput: ResNet-50, images/s over timed steps after warm-up, strategies in turn; those that keep
a device budget in software once more, under the smallest share of vanilla's peak that runs.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from gpu_mechanism import check_mechanism
from torch import Tensor, nn

from umtrain import memory, models
from umtrain.memory.meters import create_meter
from umtrain.memory.pool_cuda import TorchCudaDriver
from umtrain.memory.stream_host import PinnedHost
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings

SHAPES = {
    "resnet50": (2, 3, 256, 256),
    "resnet101": (2, 3, 192, 192),
    "resunet35": (2, 1, 256, 256),
}
SAME_BITS = ("vdnn", "lms", "um", "um_group", "um_group_prefetch", "checkpoint", "placement")
STRATEGIES = (*SAME_BITS, "stream")
PARTS = ("contract", "mechanism", "throughput")
KEEPING_A_BUDGET = ("lms", "vdnn", "checkpoint", "stream")
SHARES_OF_VANILLA = (0.5, 0.7, 1.1, 1.5, 2, 3)  # budgets that are tried in turn
N_DRAWS = 5
N_SOAK_STEPS = 200
MANAGED_LIMIT_BYTES = 8 * 2**30
N_STEPS = 5
N_WARM_UP_STEPS = 3
N_TIMED_STEPS = 10
TIME_LIMIT_S = 450


def managed_limit_bytes() -> int:
    return min(MANAGED_LIMIT_BYTES, torch.cuda.mem_get_info()[0] // 4)


def options_for(name: str, build: Callable[[], nn.Module], room_bytes: int) -> dict[str, object]:
    """Return options under which there is something to move, and never too much of it."""
    options: dict[str, object] = {"device": "cuda", "host_budget": managed_limit_bytes()}
    if name == "placement":
        options["cpu_layers"] = [next(n for n, m in build().named_children() if any(m.children()))]
    if name.startswith("um"):
        parameters = sum(p.numel() * p.element_size() for p in build().parameters())
        options["device_budget"] = 2 * parameters + room_bytes
    return options


def train(
    name: str, model: nn.Module, shape: tuple[int, ...], bf16: bool, options: dict[str, object]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return what training leaves behind (on the CPU), and the figures of the last step."""
    model = model.cuda().train().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    strategy = memory.create(name, **options)
    left: dict[str, Tensor] = {}
    try:
        for index in range(N_STEPS):
            batch = torch.randn(shape, generator=generator).cuda()
            batch = batch.contiguous(memory_format=torch.channels_last)
            if index == 0:
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                    strategy.prepare(model, batch)
            optimizer.zero_grad()
            with strategy.step():
                with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                    output = model(batch)
                loss = output.float().square().mean()
                loss.backward()
            optimizer.step()
            left[f"loss {index}"] = loss.detach().cpu()
        gradients = {f"grad {n}": p.grad for n, p in model.named_parameters()}
        state = model.state_dict()
        # Copies: closing `placement` moves layers, and their gradients with them, to the GPU.
        left |= {n: v.to("cpu", copy=True) for n, v in (gradients | state).items() if v is not None}
        figures = asdict(strategy.stats())
    finally:
        strategy.close()
        torch.cuda.synchronize()
    return {name: value.cpu() for name, value in left.items()}, figures


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    differences = [0.0]
    for name, value in left.items():
        scale = value.double().abs().max().item() or 1.0
        gap = (value.double() - right[name].double()).abs().max().item()
        differences.append(gap / scale)
    return max(differences)


def check_contract(rows: list[dict[str, object]]) -> None:
    for model_name, shape in SHAPES.items():
        torch.manual_seed(0)
        fresh = models.create(model_name, in_channels=shape[1], n_outputs=2)

        def build(fresh: nn.Module = fresh) -> nn.Module:
            return deepcopy(fresh)

        for bf16 in (False, True):
            expected, _ = train("vanilla", build(), shape, bf16, {"device": "cuda"})
            for name in ("vanilla", *SAME_BITS):
                row = {"model": model_name, "precision": "bf16" if bf16 else "fp32", "memory": name}
                rows.append(row | check_one(name, build, shape, bf16, expected))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)


def check_streaming(rows: list[dict[str, object]]) -> None:
    for model_name, shape in SHAPES.items():
        for precision in (torch.float64, torch.float32, torch.bfloat16):
            draws = 1 if precision == torch.float64 else N_DRAWS
            found = [errors_of_draw(model_name, shape, precision, seed) for seed in range(draws)]
            row = {
                "model": model_name,
                "precision": str(precision).removeprefix("torch."),
                "memory": "stream",
                "errors_against_float64": [errors["stream"] for errors in found],
                "errors_of_vanilla": [errors["vanilla"] for errors in found],
                "same_when_swapping": found[0]["swapping"] == found[0]["stream"],
            }
            rows.append(row | {"as_exact": is_as_exact(row)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)


def is_as_exact(row: dict[str, object]) -> bool:
    """Return whether streaming errs no more than ordinary training, or by 1e-11 in float64.

    A sign test, at 5%: it may err more (by 5%) in some draws, but not in nearly all.
    """
    streamed, plain = row["errors_against_float64"], row["errors_of_vanilla"]
    if row["precision"] == "float64":
        small = max(streamed) <= 1e-11
    else:
        n_worse = sum(a > 1.05 * b for a, b in zip(streamed, plain, strict=True))
        ways = sum(math.comb(len(plain), k) for k in range(n_worse, len(plain) + 1))
        small = ways / 2 ** len(plain) > 0.05
    return small and bool(row["same_when_swapping"])


def errors_of_draw(
    model_name: str, shape: tuple[int, ...], precision: torch.dtype, seed: int
) -> dict[str, float]:
    """Return the error of all gradients, by way, for weights and images drawn from `seed`."""
    torch.manual_seed(seed)
    fresh = models.create(model_name, in_channels=shape[1], n_outputs=2)
    batches = [torch.randn(shape, device="cuda") for _ in range(3)]
    exact = gradients_of("vanilla", fresh, batches, torch.float64)
    ways = ("vanilla", "stream", "swapping") if seed == 0 else ("vanilla", "stream")
    return {way: error_of(gradients_of(way, fresh, batches, precision), exact) for way in ways}


def gradients_of(
    name: str,
    fresh: nn.Module,
    batches: list[Tensor],
    precision: torch.dtype,
) -> Tensor:
    """Return the gradients of several steps, added up, as float64."""
    wide = torch.float64 if precision == torch.float64 else torch.float32
    model = deepcopy(fresh).to("cuda", wide).train().to(memory_format=torch.channels_last)
    forward: Callable[[Tensor], Tensor] = model
    if name != "vanilla":
        host = PinnedHost(TorchCudaDriver(), None, create_meter("cuda"))
        budget = (lambda: 0) if name == "swapping" else (lambda: None)
        forward = Streamer(model, Settings(budget, host, 2**22))
    is_bf16 = precision == torch.bfloat16
    for batch in batches:
        given = batch.to(wide).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=is_bf16):
            output = forward(given)
        output.double().square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def error_of(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def soak() -> dict[str, object]:
    """Run many steps under the strategies with streams and threads of their own: no deadlock,
    and no growth of what torch's allocator holds after the first quarter."""
    held: dict[str, list[int]] = {}
    for name in ("lms", "um_group_prefetch", "stream"):
        torch.manual_seed(0)
        model = models.create("resnet50", in_channels=3, n_outputs=2).cuda()
        model = model.to(memory_format=torch.channels_last)
        batch = torch.randn(2, 3, 192, 192, device="cuda")
        batch = batch.contiguous(memory_format=torch.channels_last)
        options = options_for(name, lambda model=model: model, 16 * 2**20)
        strategy = memory.create(name, **options)
        sizes = []
        try:
            strategy.prepare(model, batch)
            for _ in range(N_SOAK_STEPS):
                with strategy.step():
                    model(batch).square().mean().backward()
                model.zero_grad()
                sizes.append(torch.cuda.memory_allocated())
        finally:
            strategy.close()
        held[name] = [max(sizes[: N_SOAK_STEPS // 4]), max(sizes[-N_SOAK_STEPS // 4 :])]
        del model, batch, strategy
        gc.collect()
        held[name].append(torch.cuda.memory_allocated())
        print(json.dumps({"soak": name, "held_bytes": held[name]}), file=sys.stderr, flush=True)
    return {"steps": N_SOAK_STEPS, "held_bytes_in_first_quarter_last_quarter_and_after": held}


def check_one(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    bf16: bool,
    expected: dict[str, Tensor],
) -> dict[str, object]:
    try:
        options = options_for(name, build, 16 * 2**20) if name != "vanilla" else {"device": "cuda"}
        left, figures = train(name, build(), shape, bf16, options)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "same_bits": all(torch.equal(expected[key], left[key]) for key in expected),
        "largest_relative_difference": largest_difference(expected, left),
        "swapped_out_bytes": figures["swapped_out_bytes"],
        "swapped_in_bytes": figures["swapped_in_bytes"],
        "prefetch_hits": figures["prefetch_hits"],
        "prefetch_late": figures["prefetch_late"],
    }


def measure_throughput(res: int, batch_size: int, deadline_s: float) -> list[dict[str, object]]:
    torch.manual_seed(0)
    fresh = models.create("resnet50", in_channels=3, n_outputs=2)
    rows: list[dict[str, object]] = []

    def measure(name: str, budget_bytes: int | None) -> bool:
        row: dict[str, object] = {"memory": name, "res": res, "device_budget_bytes": budget_bytes}
        if time.monotonic() > deadline_s:
            row["error"] = "left out: out of time"
        else:
            try:
                row |= time_steps(name, fresh, res, batch_size, budget_bytes)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        return "error" not in row

    for name in ("vanilla", *STRATEGIES):
        measure(name, None)
    for name in KEEPING_A_BUDGET:
        for share in SHARES_OF_VANILLA:
            budget_bytes = share_of_peak(rows[0], share)
            if budget_bytes is not None and measure(name, budget_bytes):
                break
    return rows


def share_of_peak(vanilla: dict[str, object], share: float) -> int | None:
    """Return a share of what `vanilla` held at its peak, if it ran."""
    use = vanilla.get("memory_use")
    return None if use is None else int(share * use["device_peak_bytes"])


def time_steps(
    name: str, fresh: nn.Module, res: int, batch_size: int, budget_bytes: int | None
) -> dict[str, object]:
    model = deepcopy(fresh).cuda().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = torch.randn(batch_size, 3, res, res, device="cuda")
    batch = batch.contiguous(memory_format=torch.channels_last)
    options = {"device": "cuda"}
    if name != "vanilla":
        options = options_for(name, lambda: deepcopy(fresh), 2**30)
    if budget_bytes is not None:
        options["device_budget"] = budget_bytes
    torch.cuda.empty_cache()
    strategy = memory.create(name, **options)
    times_s = []
    try:
        with torch.autocast("cuda", torch.bfloat16):
            strategy.prepare(model, batch)
        for _ in range(N_WARM_UP_STEPS + N_TIMED_STEPS):
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            optimizer.zero_grad()
            with strategy.step():
                with torch.autocast("cuda", torch.bfloat16):
                    output = model(batch)
                output.float().square().mean().backward()
            optimizer.step()
            torch.cuda.synchronize()
            times_s.append(time.perf_counter() - start_s)
        figures = asdict(strategy.stats())
    finally:
        strategy.close()
    rates = [batch_size / step_s for step_s in times_s[N_WARM_UP_STEPS:]]
    return {
        "memory": name,
        "res": res,
        "batch_size": batch_size,
        "precision": "bf16",
        "images_per_s": {"mean": statistics.mean(rates), "std": statistics.stdev(rates)},
        "memory_use": figures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--res", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--timeline", type=Path, help="where to draw what moved when, as PNG")
    arguments = parser.parse_args()
    start_s = time.monotonic()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    contract: list[dict[str, object]] = []
    soaked, mechanism, throughput = None, None, []
    if "contract" in arguments.parts:
        check_contract(contract)
        check_streaming(contract)
        soaked = soak()
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
    if "mechanism" in arguments.parts:
        try:
            mechanism = check_mechanism(arguments.timeline)
        except Exception as error:
            traceback.print_exc()
            mechanism = {"error": f"{type(error).__name__}: {error}"}
    if "throughput" in arguments.parts:
        deadline_s = start_s + TIME_LIMIT_S
        throughput = [
            row
            for res in arguments.res
            for row in measure_throughput(res, arguments.batch_size, deadline_s)
        ]
    failed = [row for row in contract if "error" in row or not is_as_expected(row)]
    failed += [mechanism] if mechanism is not None and "error" in mechanism else []
    document = {
        "device": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "managed_limit_bytes": managed_limit_bytes(),
        "command": " ".join(sys.argv),
        "seconds": time.monotonic() - start_s,
        "failed": failed,
        "contract": contract,
        "soak": soaked,
        "mechanism": mechanism,
        "throughput": throughput,
    }
    print(json.dumps(document, indent=1))
    return 1 if failed else 0


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def is_as_expected(row: dict[str, object]) -> bool:
    """Return whether a contract row is fine: same bits, but for layers placed on the CPU."""
    if row["memory"] == "stream":
        return bool(row["as_exact"])
    return bool(row["same_bits"]) or row["memory"] == "placement"


if __name__ == "__main__":
    sys.exit(main())
