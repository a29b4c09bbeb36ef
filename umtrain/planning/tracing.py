"""Run a training step on fake tensors and note all that it does: no memory, no compute.

Autograd, autocast, hooks and in-place operations are torch's own, so operations and lifetimes are
those of a real step, at any resolution, in about a second.

# Note: [When a storage dies]
# A storage's finalizer runs when its last owner lets go: a variable of the model, an autograd
# node, a gradient. Nothing here may own one between two operations; addresses of storages are
# used again, so what is known of one is forgotten as it dies.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from umtrain.errors import ConfigError
from umtrain.memory.tensors import batch_arguments, fake_like, fake_state, planned_device
from umtrain.memory.working_set import leaf_modules
from umtrain.planning.step import Allocation, Convolution, Kind, Operation, Phase, Save, StepTrace

Loss = Callable[[Any], Tensor]

_next_node_number: Callable[[], int] = vars(torch.autograd)["_get_sequence_nr"]

_aten = torch.ops.aten
_ALLOCATES = {_aten.empty_like, _aten.new_empty, _aten.new_empty_strided}
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
# An update reads weight, gradient and its own state, and writes all but the gradient.
ADAM_STATES = 2
_OTHER_READS, _OTHER_WRITES = 2, 1


def mean_square(output: Any) -> Tensor:
    """Return a loss that needs no target; what it costs is little beside any network."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    losses = [tensor.float().square().mean() for tensor in tensors]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def trace_step(
    model: nn.Module,
    sample_batch: Any,
    *,
    precision: str,
    loss: Loss = mean_square,
    n_states: int = ADAM_STATES,
    around: AbstractContextManager[Any] | None = None,
) -> StepTrace:
    """Return what a step of forward, backward and a fused update does.

    `sample_batch` is the model's input, or the tuple of its inputs; only shapes, dtypes and strides
    count, so tensors may be on "meta", as may the model be; both are traced where the model is, or
    on the CPU. `precision` is fp32 or bf16 (autocast); the optimizer holds `n_states` numbers for
    each parameter. `around` is entered first: a strategy
    that changes how the model runs. Raises ConfigError if the model cannot run without data.
    """
    device = planned_device(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    try:
        with around or nullcontext():
            state = fake_state(model, mode, device)
            batch = tree_map_only(
                Tensor, lambda x: fake_like(x, mode, device), batch_arguments(sample_batch)
            )
            recorder.hold(state, batch)
            _run(model, state, batch, mode, recorder, _Setting(device, precision, loss))
            recorder.finish(state, n_states)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be planned, as it cannot run without data: {error}"
        ) from error
    return recorder.step()


@dataclass(frozen=True)
class _Setting:
    device: torch.device
    precision: str
    loss: Loss


def _run(
    model: nn.Module,
    state: dict[str, Tensor],
    batch: Any,
    mode: FakeTensorMode,
    recorder: "_Recorder",
    setting: _Setting,
) -> None:
    # A list, emptied as the call is made: no frame of ours may hold the output.
    with mode, recorder, recorder.following(model), torch.enable_grad():
        with _autocast(setting):
            outputs = [functional_call(model, state, batch)]
        recorder.leave_model()
        loss = setting.loss(outputs.pop())
        recorder.phase = "backward"
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward(loss)


@contextmanager
def _autocast(setting: _Setting) -> Iterator[None]:
    kind = setting.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=setting.precision == "bf16"):
        yield
        # Inside another autocast context its copies of weights would live on in the cache.
        torch.clear_autocast_cache()


@dataclass
class _Storage:
    """What is known of a storage while it is alive."""

    n_bytes: int
    kind: Kind
    first: int
    layer: str
    last_forward: int = 0
    touched: list[int] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations, and storages from their first use to their finalizer."""

    phase: Phase = "forward"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[Operation] = []
        self._allocations: list[Allocation] = []
        self._alive: dict[int, _Storage] = {}
        self._layer, self._kind = "", ""
        self._input_shapes: frozenset[torch.Size] = frozenset()
        self._layer_of_node: dict[int, str] = {}
        self._watches: dict[int, Any] = {}

    def hold(self, state: dict[str, Tensor], batch: Any) -> None:
        """Take note of what is there before the step."""
        for tensor in state.values():
            self._watch(tensor, "parameter" if tensor.requires_grad else "buffer")
        for tensor in _tensors(batch):
            self._watch(tensor, "input")

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Know which layer runs, and what autograd saves."""
        with ExitStack() as stack:
            for name, module in leaf_modules(model):
                enter = self._make_enter(name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved)
            )
            yield

    def leave_model(self) -> None:
        """Let what follows belong to no layer."""
        self._layer, self._kind = "", ""

    def finish(self, state: dict[str, Tensor], n_states: int) -> None:
        """Add the update; what is alive now outlives the step."""
        gradients = [p.grad for p in state.values() if p.grad is not None]
        for gradient in gradients:
            storage = self._alive.get(_identity(gradient))
            if storage is not None:
                storage.kind = "gradient"
        learned_bytes = sum(g.numel() * g.element_size() for g in gradients)
        if gradients:
            self._add_update(gradients[0].dtype, learned_bytes, n_states)
        for finalizer in self._watches.values():
            finalizer.detach()
        for identity in list(self._alive):
            self._close(identity)

    def step(self) -> StepTrace:
        """Return what was noted."""
        return StepTrace(self._operations, sorted(self._allocations, key=lambda a: a.first))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note it; views and mere allocations are no operations."""
        if self.phase == "forward":
            # Autograd makes the node of an operation before it calls its kernel.
            newest = _next_node_number() - 1
            self._layer_of_node.setdefault(newest, self._layer)
        result = func(*args, **(kwargs or {}))
        reads, writes = _tensors((args, kwargs)), _written(func, args, result)
        index = len(self._operations)
        if self._is_computed(func, reads, writes):
            self._operations.append(self._operation(func, args, kwargs or {}, result))
        for tensor in writes:
            self._watch(tensor, "temporary", index)
        if index < len(self._operations):
            self._note_touches((*reads, *writes), index)
        return result

    def _is_computed(self, func: Any, reads: list[Tensor], writes: list[Tensor]) -> bool:
        if not writes or func.is_view or not reads or func._overloadpacket in _ALLOCATES:
            return False
        known = {_identity(tensor) for tensor in reads}
        is_alias = all(_identity(tensor) in known for tensor in writes)
        return not is_alias or func._schema.is_mutable

    def _operation(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Operation:
        reads, writes = _tensors((args, kwargs)), _written(func, args, result)
        packet = func._overloadpacket
        count = flop_registry.get(packet)
        flops = float(count(*args, **kwargs, out_val=result)) if count is not None else 0.0
        name = packet.__name__
        is_cast = name == "_to_copy"
        dtype = next(
            (t.dtype for t in (writes if is_cast else reads) if t.is_floating_point()), None
        )
        return Operation(
            name=name,
            layer=self._current_layer(),
            phase=self.phase,
            dtype=_DTYPES.get(dtype, str(dtype).removeprefix("torch.")) if dtype else "fp32",
            flops=flops,
            read_bytes=_distinct_bytes(reads),
            written_bytes=_distinct_bytes(writes),
            convolution=_convolution(name, args, result),
        )

    def _current_layer(self) -> str:
        """Return the layer that runs; in backward, the one whose forward made the node."""
        if self.phase == "forward":
            return self._layer
        node = torch._C._current_autograd_node()
        return self._layer_of_node.get(node._sequence_nr(), "") if node is not None else ""

    def _note_touches(self, tensors: Iterable[Tensor], index: int) -> None:
        for identity in {_identity(tensor) for tensor in tensors}:
            storage = self._alive.get(identity)
            if storage is not None:
                storage.touched.append(index)
                if self.phase == "forward":
                    storage.last_forward = index

    def _watch(self, tensor: Tensor, kind: Kind, first: int = 0) -> None:
        """Know `tensor`'s storage from now on. See Note: [When a storage dies]."""
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._alive:
            return
        self._alive[identity] = _Storage(storage.nbytes(), kind, first, self._layer)
        self._watches[identity] = weakref.finalize(storage, self._close, identity)

    def _close(self, identity: int) -> None:
        storage = self._alive.pop(identity)
        self._watches.pop(identity, None)
        last = max(storage.first, len(self._operations) - 1)
        if storage.n_bytes == 0 or storage.first >= len(self._operations):
            return
        is_saved = storage.kind == "saved"
        self._allocations.append(
            Allocation(
                n_bytes=storage.n_bytes,
                kind=storage.kind,
                first=storage.first,
                last=last,
                layer=storage.layer,
                touched=tuple(storage.touched),
                saves=tuple(storage.saves),
                saved_until=max(storage.first, storage.last_forward) if is_saved else None,
            )
        )

    def _save(self, tensor: Tensor) -> Tensor:
        storage = self._alive.get(_identity(tensor))
        if storage is not None and storage.kind in ("temporary", "input", "saved"):
            if storage.kind == "temporary":
                storage.kind = "saved"
            layer_kind = self._kind if tensor.shape in self._input_shapes else ""
            storage.saves.append(Save(len(self._operations), layer_kind))
        return tensor.detach()

    def _make_enter(self, name: str) -> Any:
        def enter(module: nn.Module, arguments: Any, keywords: Any) -> None:
            self._layer, self._kind = name, type(module).__name__
            self._input_shapes = frozenset(t.shape for t in _tensors((arguments, keywords)))

        return enter

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._input_shapes = frozenset()

    def _add_update(self, dtype: torch.dtype, learned_bytes: int, n_states: int) -> None:
        operation = Operation(
            name="_fused_adamw_",
            layer="",
            phase="optimizer",
            dtype=_DTYPES.get(dtype, str(dtype)),
            flops=0.0,
            read_bytes=(_OTHER_READS + n_states) * learned_bytes,
            written_bytes=(_OTHER_WRITES + n_states) * learned_bytes,
        )
        self._operations.append(operation)
        last = len(self._operations) - 1
        if n_states:
            self._allocations.append(Allocation(n_states * learned_bytes, "state", 0, last, ""))


def _convolution(name: str, args: Any, result: Any) -> Convolution | None:
    if name == "convolution":
        output, (inputs, weight), (stride, groups) = result, args[:2], (args[3], args[8])
    elif name == "convolution_backward":
        output, inputs, weight, stride, groups = (args[i] for i in (0, 1, 2, 4, 9))
    else:
        return None
    return Convolution(
        in_channels=inputs.shape[1],
        out_channels=output.shape[1],
        kernel=tuple(weight.shape[2:]),
        stride=tuple(stride),
        groups=groups,
        output=(output.shape[0], *output.shape[2:]),
    )


def _written(func: Any, args: Any, result: Any) -> list[Tensor]:
    """Return what an operation gives back; of one that gives nothing, what it writes in place."""
    given = _tensors(result)
    if given:
        return given
    named = zip(args, func._schema.arguments, strict=False)
    return _tensors([a for a, of in named if of.alias_info is not None and of.alias_info.is_write])


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    sizes = {(_identity(t), t.storage_offset()): t.numel() * t.element_size() for t in tensors}
    return sum(sizes.values())
