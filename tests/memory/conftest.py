"""Runs of ordinary training loops under a strategy, for comparison with vanilla."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from umtrain import memory
from umtrain.memory.budget import DeviceBudget
from umtrain.memory.cuda_driver import CudaDriver

Loss = Callable[[Tensor], Tensor]


@dataclass
class Outcome:
    """All that training leaves behind."""

    losses: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]
    swapped_out_bytes: int

    def assert_same_bits(self, other: "Outcome") -> None:
        assert len(self.losses) == len(other.losses)
        assert all(torch.equal(a, b) for a, b in zip(self.losses, other.losses, strict=True))
        pairs = zip(self.gradients, other.gradients, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        different = [k for k, v in self.state.items() if not torch.equal(v, other.state[k])]
        assert different == []


class FixedRoom(DeviceBudget):
    """A budget that always has the same room left, to force paging on small models."""

    def __init__(self, room_bytes: int) -> None:
        self._room_bytes = room_bytes

    def left_bytes(self) -> int:
        return self._room_bytes

    def lift(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fixed_room() -> Callable[[int], DeviceBudget]:
    """Return what makes a budget that always has the same room left."""
    return FixedRoom


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that gives all strategies created after it so much room for pages."""

    def set_room(room_bytes: int) -> None:
        monkeypatch.setattr(
            "umtrain.memory.base.enforce_budget", lambda *arguments: FixedRoom(room_bytes)
        )

    return set_room


@pytest.fixture
def train() -> Callable[..., Outcome]:
    """Return a function that trains a fresh model under a strategy."""

    def run(
        name: str,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        *,
        n_steps: int = 4,
        bf16: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> Outcome:
        model = build().train().to(memory_format=_layout(shape))
        torch.manual_seed(0)
        batches = [_batch(shape).to(dtype) for _ in range(n_steps)]
        strategy = memory.create(name, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        losses = []
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                prepared = strategy.prepare(model, batches[0])
            for batch in batches:
                optimizer.zero_grad()
                with strategy.step():
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        output = prepared(batch)
                    loss = output.to(dtype).square().mean()
                    loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            swapped_out_bytes = strategy.stats().swapped_out_bytes
        finally:
            strategy.close()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return Outcome(losses, gradients, model.state_dict(), swapped_out_bytes)

    return run


def _batch(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=_layout(shape))


def _layout(shape: tuple[int, ...]) -> torch.memory_format:
    return torch.channels_last if len(shape) == 4 else torch.channels_last_3d


class RecordingDriver(CudaDriver):
    """Does every copy at once and writes down what it was asked for; events count up."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.done: set[object] = set()
        self._n_events = 0

    def prefetch(self, address, n_bytes, location, stream) -> None:
        self.calls.append(("prefetch", address, n_bytes, location, stream))

    def copy(self, target, source, stream) -> None:
        target.copy_(source)
        self.calls.append(("copy", source.nbytes, stream))

    def allocate_pinned(self, n_bytes) -> Tensor:
        self.calls.append(("allocate_pinned", n_bytes))
        return torch.empty(n_bytes, dtype=torch.uint8)

    def record(self, stream) -> object:
        self._n_events += 1
        self.calls.append(("record", stream, self._n_events))
        return self._n_events

    def wait(self, stream, event) -> None:
        self.calls.append(("wait", stream, event))

    def is_done(self, event) -> bool:
        return event in self.done

    def synchronize(self) -> None:
        self.calls.append(("synchronize",))

    def named(self, name: str) -> list[tuple[object, ...]]:
        """Return the calls of one kind, in order."""
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def driver() -> RecordingDriver:
    return RecordingDriver()
