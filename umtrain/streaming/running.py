"""A compiled part at work: arenas, and steps that run in them.

# Note: [Whose arena]
# A step has its arena from the start of forward to the end of backward, or until nothing refers to
# it any more. One arena serves all steps of a module, as long as one is alive at a time.
"""

import gc
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from umtrain.exchange import NO_LINKS, Links
from umtrain.streaming.backward import Backward
from umtrain.streaming.forward import Compiled, Session
from umtrain.streaming.schedule import step_flops
from umtrain.streaming.storage import HostMemory
from umtrain.streaming.volumes import folded

_log = logging.getLogger(__name__)


def _allocate(n_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


Found = tuple[list[Tensor | None], list[Tensor | None]]


@dataclass
class Settings:
    """How to stream: what the arena may take (None: keep everything), host memory, strips.

    The budget is asked for when a part first sees a kind of input. `on_progress` is told the
    share of a step's work that is done, from 0 to 1. `allocate` returns an arena, uint8
    (n_bytes,), on a device. `links` tie the engine to other ranks.
    """

    budget_bytes: Callable[[], int | None] = lambda: None
    host: HostMemory | None = None
    strip_bytes: int | None = None
    on_progress: Callable[[float], None] = lambda share: None
    allocate: Callable[[int, torch.device], Tensor] = _allocate
    links: Links = NO_LINKS


class Arenas:
    """The free arenas of a module; see Note: [Whose arena]."""

    def __init__(
        self, device: torch.device, allocate: Callable[[int, torch.device], Tensor]
    ) -> None:
        self.device, self._allocate = device, allocate
        self._free: list[Tensor] = []

    def take(self, n_bytes: int) -> Tensor:
        """Return an arena of at least `n_bytes`; smaller ones that are free go."""
        for position, arena in enumerate(self._free):
            if arena.nbytes >= n_bytes:
                return self._free.pop(position)
        self._free.clear()
        return self._allocate(n_bytes, self.device)

    @property
    def idle_bytes(self) -> int:
        """Return the memory that no step uses now; a step that has no use for it lets it go."""
        return sum(arena.nbytes for arena in self._free)

    def clear(self) -> None:
        """Let go of what no step uses now."""
        self._free.clear()

    def claim(self, arena: Tensor) -> bool:
        """Take this very arena; False if it is in use."""
        for position, free in enumerate(self._free):
            if free is arena:
                del self._free[position]
                return True
        return False

    def give_back(self, arena: Tensor) -> None:
        """Let the next step have it."""
        self._free.append(arena)


class Step(ABC):
    """One forward pass of a part, and the backward pass that belongs to it."""

    @abstractmethod
    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the part's outputs."""

    @abstractmethod
    def backward(self, given: Sequence[Tensor | None]) -> Found:
        """Return the gradients of inputs and of parameters; None where none is wanted."""


@dataclass
class Ready:
    """A compiled part, ready for steps."""

    compiled: Compiled
    settings: Settings
    parameters: list[nn.Parameter]
    arenas: Arenas
    n_steps: int = 0
    _recording: "Recording | None" = field(default=None, repr=False)

    def like_outputs(self) -> list[Tensor]:
        """Return empty tensors with the outputs' shapes."""
        program, device = self.compiled.program, self.compiled.device
        bands = self.compiled.bands
        wanted = any(self.compiled.needs.backward)
        outputs = []
        for kind, index in program.outputs:
            if kind == "pooled":
                shape, dtype = program.pooled[index]
            else:
                a_map = program.maps[index] if bands is None else bands.whole_map(index)
                shape, dtype = a_map.outer_shape, a_map.dtype
            outputs.append(torch.empty(shape, dtype=dtype, device=device, requires_grad=wanted))
        return outputs

    def new_step(self) -> Step:
        """Return the next step: recorded where that is possible and another is not under way."""
        self.n_steps += 1
        if self.n_steps == 2 and can_be_recorded(self):
            self._recording = record(self)
        if self._recording is not None and self._recording.claim():
            return RecordedStep(self, self._recording)
        return EagerStep(self)

    def new_session(self, inputs: Sequence[Tensor], arena: Tensor) -> Session:
        """Return a session in an arena."""
        progress = self._progress_of_actions()
        return Session(self.compiled, arena, self.settings.host, inputs, progress)

    def found(self, run: Backward) -> Found:
        """Return what a backward pass found, in the order of inputs and parameters."""
        inputs = [self._found_input(run, index) for index in self.compiled.program.inputs]
        return inputs, [_like(run.parameters.get(id(p)), p) for p in self.parameters]

    def _found_input(self, run: Backward, index: int) -> Tensor | None:
        gradient, bands = run.inputs.get(index), self.compiled.bands
        if gradient is None or bands is None:
            return gradient
        return bands.part_of_gradient(index, gradient)

    def _progress_of_actions(self) -> Callable[[int], None]:
        costs = step_flops(self.compiled.program, self.compiled.plan.schedule)
        total = sum(costs) or 1.0
        done = 0.0

        def report(action: int) -> None:
            nonlocal done
            done += costs[action]
            self.settings.on_progress(min(1.0, done / total))

        return report


def _like(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    if gradient is None or not parameter.requires_grad:
        return None
    return gradient.to(parameter.dtype).view_as(parameter)


class EagerStep(Step):
    """Runs every strip as it comes."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `Step`."""
        arenas = self._ready.arenas
        arena = arenas.take(self._ready.compiled.plan.arena_bytes)
        weakref.finalize(self, arenas.give_back, arena).atexit = False
        self._session = self._ready.new_session(inputs, arena)
        return self._session.forward()

    def backward(self, given: Sequence[Tensor | None]) -> Found:
        """See `Step`."""
        run = Backward(self._session, given, self._ready.settings.links.on_gradient)
        run.run(self._session.progress)
        return self._ready.found(run)


@dataclass
class Recording:
    """A step as two CUDA graphs, which read and write the tensors beside them.

    # Note: [Recorded steps]
    # On a GPU the thousands of launches of a step take longer than the kernels of a map of 4096
    # pixels. Order, addresses and sizes of all of them are fixed by the plan, so the second step
    # records them, and all later ones are one launch each way. What autograd hands out is copied:
    # the next replay writes to the same places.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    arena: Tensor
    arenas: Arenas
    session: Session
    inputs: list[Tensor]
    outputs: list[Tensor]
    given: list[Tensor]
    found: Found
    parameters: list[nn.Parameter]
    addresses: list[int]

    def claim(self) -> bool:
        """Return whether a step may run now: same weights as recorded, and the arena is free."""
        same = self.addresses == [parameter.data_ptr() for parameter in self.parameters]
        return same and self.arenas.claim(self.arena)


class RecordedStep(Step):
    """Replays a recording."""

    def __init__(self, ready: Ready, recording: Recording) -> None:
        self._recording, self._settings = recording, ready.settings
        weakref.finalize(self, recording.arenas.give_back, recording.arena).atexit = False

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `Step`."""
        for kept, new in zip(self._recording.inputs, inputs, strict=True):
            kept.copy_(new)
        self._recording.forward.replay()
        return [output.clone() for output in self._recording.outputs]

    def backward(self, given: Sequence[Tensor | None]) -> Found:
        """See `Step`."""
        for kept, new in zip(self._recording.given, given, strict=True):
            kept.zero_() if new is None else kept.copy_(new)
        self._recording.backward.replay()
        self._settings.on_progress(1.0)
        inputs, learned = self._recording.found
        pairs = zip(self._recording.parameters, learned, strict=True)
        return [_copy(x) for x in inputs], [self._handed_out(p, x) for p, x in pairs]

    def _handed_out(self, parameter: nn.Parameter, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or self._settings.links.on_gradient(parameter, gradient):
            return None
        return gradient.clone()


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def can_be_recorded(ready: Ready) -> bool:
    """Return whether a part's steps can be CUDA graphs: on a GPU, all maps in the arena."""
    compiled, links = ready.compiled, ready.settings.links
    if compiled.device.type != "cuda" or not any(compiled.needs.backward):
        return False
    if links.statistics is not None or links.bands is not None:
        return False  # what other ranks say is no part of a recording
    # An average over all steps needs the number of steps, which only the host can read.
    counts = any(n.is_updating and n.module.momentum is None for n in compiled.program.norms)
    room_bytes = torch.cuda.mem_get_info()[1] // 2
    return not counts and compiled.plan.host_bytes == 0 and compiled.plan.arena_bytes < room_bytes


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Capture `graph`; what other threads ask of CUDA meanwhile is no part of it.

    An earlier graph that the garbage collector destroys during a capture would invalidate it.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        if was_enabled:
            gc.enable()


def _renew_random_state(device: torch.device) -> None:
    """Leave the state of a capture: one that failed does not, and random numbers are refused."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


def record(ready: Ready) -> Recording | None:
    """Record a step; None, and said, where CUDA refuses. Changes no buffer of the model."""
    compiled, arenas = ready.compiled, ready.arenas
    arena = arenas.take(compiled.plan.arena_bytes)
    device = compiled.device
    inputs = []
    for index in compiled.program.inputs:
        a_map = compiled.program.maps[index]
        empty = torch.empty(a_map.shape, dtype=a_map.dtype, device=device)
        inputs.append(empty.contiguous(memory_format=torch.channels_last))
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    session = ready.new_session(inputs, arena)
    session.progress = lambda action: None
    try:
        with _capturing(forward):
            outputs = session.forward()
        given = [torch.empty_like(folded(output)) for output in outputs]
        with _capturing(backward, forward.pool()):
            run = Backward(session, given)
            run.run(session.progress)
            found = ready.found(run)
    except RuntimeError as error:
        _log.info("memory=stream: steps are not recorded as CUDA graphs (%s)", error)
        _renew_random_state(device)
        return None
    finally:
        arenas.give_back(arena)
    addresses = [parameter.data_ptr() for parameter in ready.parameters]
    tensors = (inputs, outputs, given, found, ready.parameters, addresses)
    return Recording(forward, backward, arena, arenas, session, *tensors)
