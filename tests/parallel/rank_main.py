"""One rank of the tests: reads cases as lines of JSON, runs them with the others, answers.

python rank_main.py STORE RANK N_RANKS [cpu|cuda]
"""

import copy
import importlib.util
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from umtrain import memory, models
from umtrain.errors import ConfigError, RankError
from umtrain.exchange import Links
from umtrain.models.norm import BatchNorm2d, BatchNorm3d, set_eval_statistics
from umtrain.parallel.gradients import GradientSums
from umtrain.parallel.ranks import Ranks
from umtrain.parallel.world import World, entered
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from ram_host import RamHost

DEVICE = sys.argv[4] if len(sys.argv) > 4 else "cpu"


class Residual(nn.Module):
    """A little of all: strides, a residual sum, a pooling with neighbours, global pooling."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1, bias=False),
            norm(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1, bias=False),
            norm(16),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), norm(16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.block(x) + self.shortcut(x))
        return self.head(torch.flatten(self.pool(x), 1))


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, (1, 2, 2), 1, bias=False),
        BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(3, 2, 1),
        nn.Conv3d(6, 8, 3, 1, 1, bias=False),
        BatchNorm3d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def build(name: str, norm: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "volume":
        model: nn.Module = volume()
    elif name == "residual":
        layer = {"batch": BatchNorm2d, "group": lambda width: nn.GroupNorm(4, width)}[norm]
        model = Residual(layer)
    else:
        in_channels = 1 if name == "resunet35" else 3
        model = models.create(name, in_channels=in_channels, n_outputs=2, norm=norm)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    set_eval_statistics(model, "running")
    return dense(model.double().to(DEVICE))


def loss_of(outputs: Tensor) -> Tensor:
    """Return a mean over images, which tells them and every output apart."""
    rows = outputs.flatten(1)
    weights = torch.linspace(0.5, 1.5, rows.shape[1]).to(rows)
    return (rows * weights).square().sum(1).mean()


def batches_of(shape: list[int], sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in sizes]
    return [dense(x.to(DEVICE)) for x in drawn]


def dense(x: Any) -> Any:
    """Return images, volumes or a model in channels-last memory."""
    if isinstance(x, nn.Module):
        is_volume = any(isinstance(module, nn.Conv3d) for module in x.modules())
    else:
        is_volume = x.ndim == 5
    layout = torch.channels_last_3d if is_volume else torch.channels_last
    return x.to(memory_format=layout)


def train(
    model: nn.Module,
    ranks: Ranks,
    strategy_name: str,
    options: dict[str, Any],
    batches: list[Tensor],
    accumulate: int,
) -> tuple[list[float], nn.Module]:
    """Train a step of every `accumulate` batches; return the losses and the model."""
    strategy = memory.create(strategy_name, device=DEVICE, **options)
    ranks.tie(model, strategy)
    strategy.prepare(model, ranks.band_of(ranks.share.of_batch(batches[0])))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        together = batches[start : start + accumulate]
        n_images = sum(map(len, together))
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for i, batch in enumerate(together):
            own = ranks.share.of_batch(batch)
            ids = list(map(str, range(len(own))))
            n_counted = ranks.start_batch(ids, i == len(together) - 1)
            if not ids and not ranks.joins_statistics:
                continue
            own = own if ids else torch.zeros_like(batch[:1])
            with strategy.step():
                loss = loss_of(model(ranks.band_of(own))) * (n_counted / n_images)
                loss.backward()
            total += loss.detach()
        losses.append(ranks.finish_step([total.item()])[0])
        if start + accumulate < len(batches):
            optimizer.step()
    ranks.close()
    strategy.close()
    return losses, model


def steps(
    world: World,
    *,
    model: str,
    strategy: str,
    sizes: list[int],
    norm: str = "batch",
    sync: bool = True,
    mode: str = "data",
    shape: tuple[int, ...] = (3, 65, 65),
    accumulate: int = 1,
    as_bands: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return how far ranks are from one process: the largest relative error, and where."""
    batches = batches_of(list(shape), sizes)
    network = build(model, norm)
    alone = copy.deepcopy(network)
    losses, network = train(
        network,
        Ranks(world, mode, sync, shape[1] if as_bands else 0),
        strategy,
        options or {},
        batches,
        accumulate,
    )
    expected, alone = train(
        alone, Ranks(World(), "data", False), "vanilla", {}, batches, accumulate
    )
    errors = {
        f"loss {i}": abs(a - b) / abs(b)
        for i, (a, b) in enumerate(zip(losses, expected, strict=True))
    }
    scale = max(p.grad.abs().max().item() for p in alone.parameters() if p.grad is not None)
    for (name, one), other in zip(network.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            errors[f"gradient of {name}"] = _error(one.grad, other.grad, 1e-4 * scale)
        errors[name] = _error(one, other, 1e-4)
    if sync or mode == "spatial":
        for (name, one), other in zip(network.named_buffers(), alone.buffers(), strict=True):
            errors[name] = _error(one.double(), other.double(), 1e-4)
    worst = max(errors, key=errors.__getitem__)
    return {"error": errors[worst], "where": worst, "rank": world.rank}


def _error(one: Tensor, other: Tensor, least: float) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=least)).item()


def spread(
    world: World,
    *,
    model: str,
    shape: list[int],
    n_images: int = 1,
    norm: str = "batch",
    strip_bytes: int = 4096,
    kept_share: float | None = None,
    training: bool = True,
) -> dict[str, Any]:
    """Return how far one image over all ranks, in strips, is from autograd in one process.

    `kept_share` of the maps' memory is the budget; the rest is made again or in host memory.
    """
    [x] = batches_of(shape, [n_images])
    network = build(model, norm).train(training)
    return _spread(world, network, x, strip_bytes, kept_share)


def drawn(world: World, *, path: str, strip_bytes: int, kept_share: float | None) -> dict[str, Any]:
    """Return the same for a network and images in a file; or why they are refused."""
    network, x = torch.load(path, weights_only=False)
    network = network.double().to(memory_format=torch.channels_last)
    x = x.double().contiguous(memory_format=torch.channels_last)
    try:
        return _spread(world, network, x, strip_bytes, kept_share)
    except ConfigError as error:
        return {"error": 0.0, "refused": str(error)}


def _spread(
    world: World, network: nn.Module, x: Tensor, strip_bytes: int, kept_share: float | None
) -> dict[str, Any]:
    alone = copy.deepcopy(network)
    host = RamHost() if DEVICE == "cpu" else None
    links = Links(bands=world)
    budget_bytes = None
    if kept_share is not None:
        whole = Streamer(network, Settings(strip_bytes=strip_bytes, links=links)).plan(x)
        budget_bytes = int(kept_share * max(plan.arena_bytes for plan in whole))
    settings = Settings(lambda: budget_bytes, host, strip_bytes, links=links)
    streamer = Streamer(network, settings)
    found = []
    for forward, share in ((streamer, 1 / world.n_ranks), (alone, 1.0)):
        given = dense(x.clone()).requires_grad_()
        torch.manual_seed(3)
        loss = loss_of(forward(given))
        (loss * share).backward()
        found.append((loss.detach(), given.grad))
    scale = max(p.grad.abs().max().item() for p in alone.parameters() if p.grad is not None)
    errors = {"loss": _error(found[0][0], found[1][0], 1e-4)}
    errors["input"] = _error(world.total(found[0][1]), found[1][1], max(1e-4, 1e-4 * scale))
    for (name, one), other in zip(network.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            errors[name] = _error(world.total(one.grad), other.grad, max(1e-4, 1e-4 * scale))
    for (name, one), other in zip(network.named_buffers(), alone.buffers(), strict=True):
        errors[name] = _error(one.double(), other.double(), 1e-4)
    worst = max(errors, key=errors.__getitem__)
    return {"error": errors[worst], "where": worst, "written_bytes": host and host.written_bytes}


class Tied(nn.Module):
    """Shares a layer between two places, has one that is never used, and one for `rank` 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)

    def forward(self, x: Tensor, with_rare: bool) -> Tensor:
        x = self.first(torch.relu(self.first(x)))
        return self.rare(x) if with_rare else x


def sums(world: World, *, bucket_bytes: int, passes: int) -> dict[str, Any]:
    """Return which gradients there are after `passes` passes, and the largest error of those."""
    torch.manual_seed(0)
    model = Tied().double()
    together = GradientSums(model.parameters(), world, bucket_bytes)
    alone = copy.deepcopy(model)
    for i in range(passes):
        if i == passes - 1:
            together.start()
        model(_input(world.rank, i), world.rank == 0).sum().backward()
        for rank in range(world.n_ranks):
            alone(_input(rank, i), rank == 0).sum().backward()
    together.finish()
    together.close()
    pairs = list(zip(model.named_parameters(), alone.parameters(), strict=True))
    return {
        "missing": [name for (name, p), _ in pairs if p.grad is None],
        "error": max(_error(p.grad, q.grad, 1e-9) for (_, p), q in pairs if p.grad is not None),
    }


def late(world: World) -> dict[str, Any]:
    """Hand in a gradient twice, the second time when its sum has begun; return what comes out."""
    parameter = nn.Parameter(torch.zeros(3))
    together = GradientSums([parameter], world)
    together.start()
    for value in (1.0, 10.0):
        assert together.take(parameter, torch.full((3,), value * (world.rank + 1)))
    together.finish()
    together.close()
    assert not together.take(parameter, torch.ones(3)), "nothing is taken between steps"
    return {"gradient": parameter.grad.tolist()}


def mixed(world: World, *, strategy: str) -> dict[str, Any]:
    """Return how far gradients of a step in bf16 are from those in fp32: of ranks, and of one."""
    [batch] = [x.float() for x in batches_of([3, 65, 65], [2 * world.n_ranks])]
    network = build("residual", "batch").float()
    exact, alone = copy.deepcopy(network), copy.deepcopy(network)
    ranks = Ranks(world, "data", True)
    own = ranks.share.of_batch(batch)
    used = memory.create(strategy, device=DEVICE)
    ranks.tie(network, used)
    with torch.autocast(DEVICE, torch.bfloat16):
        used.prepare(network, own)
    share = ranks.start_batch(list(map(str, range(len(own)))), True) / len(batch)
    with used.step():
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs = network(own)
        (loss_of(outputs.float()) * share).backward()
    ranks.finish_step([])
    used.close()
    loss_of(exact(batch)).backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = alone(batch)
    loss_of(outputs.float()).backward()
    of_ranks, of_one, true = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (network, alone, exact)
    )
    errors = [((found - true).norm() / true.norm()).item() for found in (of_ranks, of_one)]
    return {"of_ranks": errors[0], "of_one": errors[1]}


def lose(world: World) -> str:
    """End every rank but the first, and return what it makes of that."""
    if not world.is_main:
        os._exit(7)
    try:
        world.total(torch.ones(3))
    except RankError as error:
        return str(error)
    return "nothing"


def _input(rank: int, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + i)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


CASES = {
    "steps": steps,
    "spread": spread,
    "drawn": drawn,
    "sums": sums,
    "late": late,
    "lose": lose,
    "mixed": mixed,
}


def import_networks() -> None:
    """Make the classes of drawn networks known under the name that files have for them."""
    path = Path(__file__).parents[1] / "streaming" / "test_random_networks.py"
    spec = importlib.util.spec_from_file_location("random_networks", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["random_networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["random_networks"])


def main() -> None:
    store, rank, n_ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    import_networks()
    device = torch.device(DEVICE, rank) if DEVICE == "cuda" else torch.device(DEVICE)
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if DEVICE == "cpu" else "nccl",
        store=dist.FileStore(str(store), n_ranks),
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=100),
    )
    with entered(World(rank, n_ranks, device)) as world:
        for line in sys.stdin:
            asked = json.loads(line)
            answer = CASES[asked.pop("case")](world, **asked)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
