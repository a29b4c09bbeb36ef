"""A module whose forward and backward run strip by strip: the engine's face to autograd.

# Note: [What autograd sees]
# Each streamed part of a network is one node of the autograd graph, with the part's inputs and
# parameters as its inputs. So gradients land in .grad, hooks on tensors run, and whatever stands
# before or behind is ordinary PyTorch.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import once_differentiable

from umtrain.errors import ConfigError
from umtrain.streaming.bands import Bands
from umtrain.streaming.building import build
from umtrain.streaming.forward import Compiled
from umtrain.streaming.kernels import create_kernels
from umtrain.streaming.plan import SPEEDS, Plan, make_plan
from umtrain.streaming.program import Program
from umtrain.streaming.running import Arenas, Ready, Settings
from umtrain.streaming.schedule import Needs
from umtrain.streaming.tracing import Traced, trace
from umtrain.streaming.volumes import folded, plane_of, unfolded

_log = logging.getLogger(__name__)

# The cache of a processor; on a GPU, what keeps launches from being the larger part.
STRIP_BYTES = {"cpu": 8 * 2**20, "cuda": 2**29}


class Streamer:
    """Runs a module strip by strip; stands in for the module's `forward`.

    Raises ConfigError, naming what is in the way, for a module of which nothing can be streamed.
    """

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self._module, self._settings = module, settings
        self._traced: dict[tuple[bool, ...], _Parts] = {}
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._arenas = Arenas(device, settings.allocate)
        self._told: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        """Return the module's output for `inputs`."""
        training = self._training()
        if training not in self._traced:
            traced = trace(self._module)
            self._tell(traced.whole)
            self._traced[training] = _Parts(traced, self._settings, self._arenas)
        return self._traced[training].parts(*inputs)

    def _tell(self, whole: Sequence[str]) -> None:
        """Say, once, what of the part of the network that has maps runs whole."""
        new = [name for name in whole if name not in self._told]
        self._told.update(new)
        if new:
            _log.info("memory=stream: not streamed, but run whole: %s", ", ".join(new))

    def plan(self, *inputs: Tensor) -> list[Plan]:
        """Return the plans of the parts for inputs like these, which a step will follow.

        Costs neither memory nor compute. Run it under the autocast that training runs in. Raises
        OutOfMemoryError if there is none.
        """
        return [compiled.plan for compiled in self.compile(*inputs)]

    def compile(self, *inputs: Tensor) -> list[Compiled]:
        """Return the parts as a step will run them, as `plan`; inputs may be on "meta"."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        device = self._arenas.device
        with mode, torch.enable_grad():
            fakes = [_like(x, device) if x.is_meta else mode.from_tensor(x) for x in inputs]
            self(*fakes)
        parts = self._traced[self._training()].streamed
        return [ready.compiled for part in parts for ready in part.compiled.values()]

    @property
    def idle_bytes(self) -> int:
        """Return the memory of arenas that no step uses now."""
        return self._arenas.idle_bytes

    def close(self) -> None:
        """Let go of the arena and of all that was compiled; a step under way keeps its own."""
        self._traced.clear()
        self._arenas.clear()

    def _training(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._module.modules())


class _Parts:
    """A traced module, with its streamed parts put in the place of the originals."""

    def __init__(self, traced: Traced, settings: Settings, arenas: Arenas) -> None:
        self.parts = traced.parts
        self.streamed: list[_Part] = []
        takes_bands = settings.links.n_input_rows > 0
        if takes_bands:
            _check_that_inputs_are_streamed(traced)
        for name in traced.streamed:
            is_input = [
                takes_bands and node.op == "placeholder" for node in _arguments(traced, name)
            ]
            self.streamed.append(_Part(getattr(self.parts, name), settings, arenas, is_input))
            setattr(self.parts, name, self.streamed[-1])


def _arguments(traced: Traced, name: str) -> list[fx.Node]:
    """Return what a part is called with."""
    [call] = [node for node in traced.parts.graph.nodes if node.target == name]
    return [argument for argument in call.args if isinstance(argument, fx.Node)]


def _check_that_inputs_are_streamed(traced: Traced) -> None:
    """Raise ConfigError if an input, of which there is a band only, is read by what runs whole."""
    for node in traced.parts.graph.nodes:
        whole = [user for user in node.users if user.target not in traced.streamed]
        if node.op == "placeholder" and whole:
            raise ConfigError(
                f"parallel=spatial: {', '.join(traced.whole)} reads the whole image and cannot be "
                "streamed; use parallel=data"
            )


class _Part(nn.Module):
    """One streamed part; compiled anew for each kind of input.

    `is_band` says which of its inputs are the model's, given as a band of rows.
    """

    def __init__(
        self,
        original: fx.GraphModule,
        settings: Settings,
        arenas: Arenas,
        is_band: Sequence[bool],
    ) -> None:
        super().__init__()
        self._is_band = is_band
        self._original = [original]  # in a list: its parameters are the model's, not this part's
        self._settings, self._arenas, self._device = settings, arenas, arenas.device
        self.compiled: dict[Any, Ready] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """Run the part; fake tensors are given fake ones."""
        key = self._key(inputs)
        if key not in self.compiled:
            self.compiled[key] = self._compile(inputs)
        ready = self.compiled[key]
        if any(isinstance(x, FakeTensor) for x in inputs):
            outputs = tuple(ready.like_outputs())
            return outputs[0] if len(outputs) == 1 else outputs
        outputs = _Streamed.apply(ready, len(inputs), *inputs, *ready.parameters)
        return outputs[0] if len(outputs) == 1 else outputs

    def _key(self, inputs: Sequence[Tensor]) -> Any:
        kind = self._device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        like = tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in inputs)
        wanted = tuple(p.requires_grad for p in self._original[0].parameters())
        return like, autocast, torch.is_grad_enabled(), wanted

    def _compile(self, inputs: Sequence[Tensor]) -> Ready:
        links, bands = self._settings.links, None
        shapes = [list(x.shape) for x in inputs]
        for shape, is_band in zip(shapes, self._is_band, strict=True):
            if is_band:
                shape[2] = links.n_input_rows
        program = program_of(self._original[0], inputs, shapes)
        if links.bands is not None:
            bands = Bands(program, links.bands, self._is_band)
        needs = Needs(program, [x.requires_grad for x in inputs], torch.is_grad_enabled())
        settings = self._settings
        budget_bytes = settings.budget_bytes()
        if budget_bytes is not None:
            budget_bytes = self._agreed(budget_bytes + self._arenas.idle_bytes)
        speeds = SPEEDS[self._device.type]
        planned = program if bands is None else bands.largest
        plan = make_plan(planned, needs, budget_bytes, self._host_room(), speeds)
        strip_bytes = settings.strip_bytes or STRIP_BYTES[self._device.type]
        kernels = create_kernels(self._device)
        own = program if bands is None else bands.program
        compiled = Compiled(own, needs, plan, kernels, self._device, strip_bytes, links, bands)
        return Ready(compiled, settings, program.parameters(), self._arenas)

    def _host_room(self) -> Callable[[], int] | None:
        host = self._settings.host
        return None if host is None else lambda: self._agreed(host.room_bytes())

    def _agreed(self, n_bytes: int) -> int:
        """Return what all ranks have of something, where they follow one plan."""
        bands = self._settings.links.bands
        if bands is None:
            return n_bytes
        with unset_fake_temporarily():
            return bands.least(n_bytes)


def _like(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)


def program_of(
    part: fx.GraphModule, inputs: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None = None
) -> Program:
    """Return a part's program for inputs like these, found without memory or compute.

    `shapes` are theirs as a whole, where `inputs` are bands.
    """
    device, shapes = inputs[0].device, shapes or [x.shape for x in inputs]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        pairs = zip(inputs, shapes, strict=True)
        fakes = [torch.empty(shape, dtype=x.dtype, device=device) for x, shape in pairs]
        return build(part, fakes)


class _Streamed(torch.autograd.Function):
    """See Note: [What autograd sees]."""

    @staticmethod
    def forward(ctx: Any, ready: Ready, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [folded(x.detach()) for x in tensors[:n_inputs]]
        with torch.no_grad(), _without_autocast(ready.compiled.device):
            step = ready.new_step()
            outputs = step.forward(inputs)
        ctx.step = step if any(ready.compiled.needs.backward) else None
        ctx.device = ready.compiled.device
        ctx.input_planes = [plane_of(x) for x in tensors[:n_inputs]]
        planes = ready.compiled.program.output_planes
        return tuple(unfolded(x, plane) for x, plane in zip(outputs, planes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        step, ctx.step = ctx.step, None
        if step is None:
            raise RuntimeError(
                "memory=stream: backward a second time through the same forward pass; its feature "
                "maps are gone (retain_graph has no effect)"
            )
        with torch.no_grad(), _without_autocast(ctx.device):
            inputs, learned = step.backward([dy if dy is None else folded(dy) for dy in given])
        gradients = [
            dx if dx is None else unfolded(dx, plane)
            for dx, plane in zip(inputs, ctx.input_planes, strict=True)
        ]
        return (None, None, *gradients, *learned)


def _without_autocast(device: torch.device) -> Any:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
