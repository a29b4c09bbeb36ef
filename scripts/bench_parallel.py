"""What several processes cost and give: exactness, efficiency, and bytes that go between them.

Why: N processes should train as one does, N times as fast, and send no more than they have to.
Method: every process has one core of its own and one thread. One process and several take turns,
round by round, on one machine; a warm-up step is left out. Bytes are counted where they are handed
to torch.distributed, and turned into what a ring sends: 2(N-1)/N of an operand that is summed,
N-1 times an operand that is gathered, and rows as they are. The least is the gradients, summed
once.

    python scripts/bench_parallel.py efficiency [--ranks 2] [--res 256] [--rounds 2]
    python scripts/bench_parallel.py exactness [--ranks 2 3] [--device cpu]

prints a table and, as its last line, JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = {
    "data, vanilla": {"strategy": "vanilla", "mode": "data", "sync": False},
    "data, vanilla, joint norms": {"strategy": "vanilla", "mode": "data", "sync": True},
    "data, stream": {"strategy": "stream", "mode": "data", "sync": False},
    "data, stream, joint norms": {"strategy": "stream", "mode": "data", "sync": True},
    "one image over all": {"strategy": "stream", "mode": "spatial", "sync": False},
}
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
RANK_MAIN = Path(__file__).parents[1] / "tests" / "parallel" / "rank_main.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    efficiency = commands.add_parser("efficiency")
    efficiency.add_argument("--ranks", type=int, default=2)
    efficiency.add_argument("--res", type=int, default=256)
    efficiency.add_argument("--rounds", type=int, default=2)
    efficiency.add_argument("--steps", type=int, default=4)
    efficiency.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    exactness = commands.add_parser("exactness")
    exactness.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    exactness.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    worker = commands.add_parser("worker")
    worker.add_argument("settings")
    chosen = parser.parse_args()
    if chosen.command == "worker":
        work(**json.loads(chosen.settings))
    elif chosen.command == "exactness":
        print(json.dumps(measure_exactness(chosen.ranks, chosen.device)))
    else:
        print(json.dumps(measure_efficiency(chosen)))


# Efficiency and traffic ---------------------------------------------------------------------------


def measure_efficiency(chosen):
    found = {name: {1: [], chosen.ranks: []} for name in chosen.modes}
    for _ in range(chosen.rounds):
        for name in chosen.modes:
            for n_ranks in (1, chosen.ranks):
                settings = {**MODES[name], "res": chosen.res, "steps": chosen.steps}
                found[name][n_ranks].append(run_worker(n_ranks, settings))
    rows = [_row(name, found[name], chosen.ranks) for name in chosen.modes]
    print(f"ResNet-50, fp32, {chosen.res} x {chosen.res}, one core a process")
    print(f"{'':<28}{'images/s, 1':>12}{f'images/s, {chosen.ranks}':>12}{'efficiency':>12}", end="")
    print(f"{'MiB sent':>10}{'least':>8}")
    for row in rows:
        print(
            f"{row['mode']:<28}{row['images_per_s_1']:>12.3f}{row['images_per_s_n']:>12.3f}", end=""
        )
        print(f"{row['efficiency']:>12.2f}{row['sent_mib']:>10.1f}{row['least_mib']:>8.1f}")
    return {"n_ranks": chosen.ranks, "res": chosen.res, "rows": rows, "torch": _version()}


def _row(name, by_ranks, n_ranks):
    one, several = by_ranks[1], by_ranks[n_ranks]
    alone, together = (
        statistics.median(r["images_per_s"] for r in runs) for runs in (one, several)
    )
    return {
        "mode": name,
        "images_per_s_1": alone,
        "images_per_s_n": together,
        "images_per_s_n_of_rounds": [r["images_per_s"] for r in several],
        "images_per_s_1_of_rounds": [r["images_per_s"] for r in one],
        "efficiency": together / (n_ranks * alone),
        "sent_mib": several[0]["sent_bytes"] / 2**20,
        "least_mib": several[0]["least_bytes"] / 2**20,
        "calls_per_step": several[0]["n_calls"],
    }


def run_worker(n_ranks, settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, str(n_ranks), __file__, "worker", json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def work(strategy, mode, sync, res, steps):
    """Train a few steps as one rank; the first prints what it measured."""
    import torch

    from umtrain import memory, models
    from umtrain.parallel.ranks import Ranks
    from umtrain.parallel.world import joined

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    with joined("cpu") as world:
        torch.manual_seed(0)
        model = models.create("resnet50", in_channels=3, n_outputs=2)
        model = model.to(memory_format=torch.channels_last)
        ranks = Ranks(world, mode, sync)
        n_images = ranks.share.n_ranks
        x = torch.randn(1, 3, res, res).contiguous(memory_format=torch.channels_last)
        used = memory.create(strategy, device="cpu")
        ranks.tie(model, used)
        used.prepare(model, x)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        times, traffic = [], None
        for _ in range(steps + 1):
            before = dict(vars(world.traffic))
            start_s = time.perf_counter()
            share = ranks.start_batch(["x"], True) / n_images
            with used.step():
                (model(x).square().sum() * share).backward()
            ranks.finish_step([])
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start_s)
            traffic = {key: value - before[key] for key, value in vars(world.traffic).items()}
        used.close()
        if world.is_main:
            print(json.dumps(_measured(model, world.n_ranks, n_images, times[1:], traffic)))


def _measured(model, n_ranks, n_images, times, traffic):
    once = 2 * (n_ranks - 1) / n_ranks
    gradient_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    sent = once * traffic["reduced_bytes"] + (n_ranks - 1) * traffic["gathered_bytes"]
    return {
        "images_per_s": n_images / statistics.median(times),
        "sent_bytes": sent + traffic["sent_bytes"],
        "least_bytes": once * gradient_bytes,
        "n_calls": traffic["n_calls"],
    }


def _version():
    import torch

    return torch.__version__


# Exactness ----------------------------------------------------------------------------------------


def measure_exactness(rank_counts, device):
    """Print the largest relative error against one process, float64, by strategy and ranks."""
    rows = {}
    for n_ranks in rank_counts:
        with tempfile.TemporaryDirectory() as folder:
            rows[n_ranks] = _exactness_of(n_ranks, Path(folder) / "store", device)
    print(f"{'':<28}" + "".join(f"{n:>10} ranks" for n in rank_counts))
    for name in rows[rank_counts[0]]:
        print(f"{name:<28}" + "".join(f"{rows[n][name]:>16.1e}" for n in rank_counts))
    return {"error": {str(n): rows[n] for n in rank_counts}, "torch": _version()}


def _exactness_of(n_ranks, store, device):
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK_MAIN), str(store), str(rank), str(n_ranks), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(n_ranks)
    ]
    sizes = [2 * n_ranks, n_ranks + 1]
    cases = {
        name: {"case": "steps", "model": "residual", "strategy": name, "sizes": sizes}
        for name in STRATEGIES
    }
    cases["stream, ResNet-50"] = {
        "case": "steps", "model": "resnet50", "strategy": "stream", "sizes": [n_ranks + 1]
    }  # fmt: skip
    for model, shape in (("resnet50", [3, 161, 97]), ("resunet35", [1, 192, 128])):
        cases[f"one image over all, {model}"] = {"case": "spread", "model": model, "shape": shape}
    errors = {}
    for name, case in cases.items():
        errors[name] = max(answer["error"] for answer in _ask(ranks, case))
        print(f"{n_ranks} ranks, {name}: {errors[name]:.1e}", file=sys.stderr, flush=True)
    for rank in ranks:
        rank.stdin.close()  # of all, before any is waited for: they leave NCCL together
    for rank in ranks:
        with rank:  # waits, and closes what is left open
            pass
    return errors


def _ask(ranks, case):
    for rank in ranks:
        rank.stdin.write(json.dumps(case) + "\n")
        rank.stdin.flush()
    return [json.loads(rank.stdout.readline()) for rank in ranks]


if __name__ == "__main__":
    main()
