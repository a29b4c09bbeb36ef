"""The processes that train together: who they are, and what they say to each other.

`torchrun` starts them and tells each its rank through the environment. Everything here works in a
process that is alone too: it is a world of one, and nothing is sent.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from umtrain.errors import DeviceError, RankError
from umtrain.exchange import Rows

T = TypeVar("T")

# A rank that is lost is noticed by its connections; time alone means only that others are slow.
_PATIENCE = timedelta(hours=12)
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass
class Traffic:
    """What one rank has asked to be sent since it joined: calls and bytes of their operands."""

    reduced_bytes: int = 0
    gathered_bytes: int = 0
    sent_bytes: int = 0
    n_calls: int = 0


@dataclass
class World:
    """All ranks, seen from one of them."""

    rank: int = 0
    n_ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_idle: bool = False
    traffic: Traffic = field(default_factory=Traffic)

    def __deepcopy__(self, memo: dict[int, Any]) -> "World":
        """Return itself: a copy of a model is in the same world."""
        return self

    @property
    def is_main(self) -> bool:
        """Return whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Return whether there is nobody else."""
        return self.n_ranks == 1

    # See `umtrain.exchange.Exchange` for the first four.

    def gather(self, values: Tensor) -> Tensor:
        """Return every rank's `values`, of one shape: (n_ranks, *shape)."""
        if self.is_alone or isinstance(values, FakeTensor):
            return values.expand(self.n_ranks, *values.shape)
        values = values.contiguous()
        self._count("gathered_bytes", values)
        found = [torch.empty_like(values) for _ in range(self.n_ranks)]
        with _naming_the_loss():
            dist.all_gather(found, values)
        return torch.stack(found)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' `values`, in a new tensor."""
        summed = values.clone(memory_format=torch.contiguous_format)
        if not (self.is_alone or isinstance(values, FakeTensor)):
            self.start_total(summed)()
        return summed

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        if self.is_alone:
            return value
        return int(self.gather(torch.tensor(value, device=self.device)).min())

    def swap(self, outgoing: Sequence[Rows], incoming: Sequence[Rows]) -> None:
        """Send rows to other ranks, and fill `incoming` with what they send to this one."""
        if not outgoing and not incoming:
            return
        calls = [dist.P2POp(dist.isend, _as_bytes(rows.content), rows.rank) for rows in outgoing]
        calls += [dist.P2POp(dist.irecv, _as_bytes(rows.content), rows.rank) for rows in incoming]
        for rows in outgoing:
            self._count("sent_bytes", rows.content)
        with _naming_the_loss():
            for call in dist.batch_isend_irecv(calls):
                call.wait()

    def start_total(self, values: Tensor) -> Callable[[], None]:
        """Begin to sum `values`, dense, over all ranks in place; what is returned waits for it."""
        if self.is_alone:
            return lambda: None
        self._count("reduced_bytes", values)
        with _naming_the_loss():
            work = dist.all_reduce(values, async_op=True)
        assert work is not None

        def wait() -> None:
            with _naming_the_loss():
                work.wait()

        return wait

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of all ranks' values, one by one."""
        if self.is_alone:
            return list(values)
        summed: list[float] = self.total(
            torch.tensor(values, dtype=torch.float64, device=self.device)
        ).tolist()
        return summed

    def all_true(self, value: bool) -> bool:
        """Return whether `value` is true on every rank."""
        return bool(self.least(int(value)))

    def tell(self, value: T) -> T:
        """Return what the first rank gives, on every rank."""
        if self.is_alone:
            return value
        box: list[Any] = [value if self.is_main else None]
        with _naming_the_loss():
            dist.broadcast_object_list(box, src=0, device=self.device)
        told: T = box[0]
        return told

    def collect(self, value: T) -> list[T]:
        """Return every rank's value, on every rank, in the order of ranks."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.n_ranks
        with _naming_the_loss():
            dist.all_gather_object(found, value)
        return found

    def spread_weights(self, model: nn.Module) -> None:
        """Give every rank the first rank's parameters and buffers."""
        self.spread([*model.parameters(), *model.buffers()])

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the first rank's content of `tensors`."""
        if self.is_alone:
            return
        with torch.no_grad(), _naming_the_loss():
            for tensor in tensors:
                # Gloo and NCCL send what is dense; weights may lie in channels-last memory.
                sent = tensor.detach().contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Let the first rank run the block before the others do: it makes what they then find."""
        if not self.is_main:
            self.least(0)
        yield
        if self.is_main:
            self.least(0)

    def _count(self, kind: str, values: Tensor) -> None:
        self.traffic.n_calls += 1
        setattr(self.traffic, kind, getattr(self.traffic, kind) + values.nbytes)


def _as_bytes(content: Tensor) -> Tensor:
    """Return a dense tensor as bytes: not every backend sends every dtype."""
    dense = content if content.ndim != 4 else content.permute(0, 2, 3, 1)
    assert dense.is_contiguous()
    return dense.reshape(-1).view(torch.uint8)


@contextmanager
def _naming_the_loss() -> Iterator[None]:
    """Turn what a backend says when a connection breaks into what has happened."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankError(
            "another rank has ended while this one waited for it; the reason is in what that rank "
            f"said ({str(error).splitlines()[0]})"
        ) from error


_worlds = [World()]


def world() -> World:
    """Return the world that this process has joined; it is alone in it if it has joined none."""
    return _worlds[-1]


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the ranks that torchrun started with this process, if it did; leave them at the end.

    `device` is "cpu", "cuda" or "auto". Raises DeviceError if there is no GPU for this rank.
    """
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1:
        yield _worlds[0]
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    chosen = _device(device, local_rank)
    dist.init_process_group(
        _BACKENDS[chosen.type],
        timeout=_PATIENCE,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    with entered(World(dist.get_rank(), n_ranks, chosen)) as new:
        yield new


@contextmanager
def alone() -> Iterator[None]:
    """Be in a world of one for a while: what the other ranks have no part in."""
    _worlds.append(World())
    try:
        yield
    finally:
        _worlds.pop()


@contextmanager
def entered(new: World) -> Iterator[World]:
    """Be in a world whose process group stands; take it down at the end."""
    _worlds.append(new)
    try:
        yield new
    finally:
        _worlds.remove(new)
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(choice: str, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    n_devices = torch.cuda.device_count()
    if local_rank >= n_devices:
        raise DeviceError(
            f"device={choice}: rank {os.environ['RANK']} needs GPU number {local_rank}, and this "
            f"machine has {n_devices}; start as many processes as it has GPUs "
            f"(torchrun --nproc-per-node {max(1, n_devices)}), or use device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
