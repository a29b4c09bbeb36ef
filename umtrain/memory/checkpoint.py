"""Gradient checkpointing: groups keep their input only and run forward again in backward.

Chen et al., "Training deep nets with sublinear memory cost" (2016).

# Note: [Buffers of a group that runs twice]
# The second run must see the buffers of the first and leave no trace in them: BatchNorm would
# count each batch twice. So a group's buffers are copied before it runs, the second run works
# on such copies, and the real ones are put back after it. Exact for any module.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from umtrain.memory.allocator import HeapHoles
from umtrain.memory.base import Strategy
from umtrain.memory.grouping import block_names, group_limit_bytes
from umtrain.memory.options import Options
from umtrain.memory.working_set import (
    LayerUse,
    WorkingSets,
    leaf_modules,
    measure_working_sets,
    working_set_bytes,
)


class Checkpoint(Strategy):
    """Recomputes blocks (`grouping=blocks`) or runs of blocks up to a working set (`equal`).

    Random numbers are the same in both runs. Layers outside of blocks keep what they save.
    """

    name: ClassVar[str] = "checkpoint"

    def _attach(self, model: nn.Module, sample_batch: Any) -> nn.Module:
        measured = measure_working_sets(model, sample_batch)
        self._cleanup.enter_context(recomputing(model, sample_batch, self.options))
        if self.options.device == "cpu":
            holes = HeapHoles(measured.largest_saved_bytes)
            for _, layer in leaf_modules(model):
                hook = layer.register_forward_pre_hook(lambda *_: holes.limit())
                self._cleanup.callback(hook.remove)
        return model


@contextmanager
def recomputing(model: nn.Module, sample_batch: Any, options: Options) -> Generator[None]:
    """Run the groups of `model` a second time in backward, inside it."""
    blocks = {name: model.get_submodule(name) for name in sorted(block_names(model))}
    with ExitStack() as stack:
        if options.grouping == "equal":
            measured = measure_working_sets(model, sample_batch)
            limit_bytes = group_limit_bytes(measured, options)
            for name, container in _sequentials_of(model, blocks):
                runs = _unite(name, container, measured, limit_bytes)
                _replace_forward(stack, container, partial(_run_in_turn, runs))
                blocks = {n: b for n, b in blocks.items() if not n.startswith(f"{name}.")}
        for block in blocks.values():
            _replace_forward(stack, block, partial(_run_twice, [block], block.forward))
        yield


def _replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward
    stack.callback(delattr, module, "forward")


def _sequentials_of(
    model: nn.Module, blocks: dict[str, nn.Module]
) -> list[tuple[str, nn.Sequential]]:
    """Return the Sequentials that hold blocks, and nothing but blocks."""
    sequentials = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Sequential)]
    return [
        (name, module)
        for name, module in sequentials
        if len(module) and all(f"{name}.{child}" in blocks for child, _ in module.named_children())
    ]


def _unite(
    name: str, container: nn.Sequential, measured: WorkingSets, limit_bytes: int
) -> list[list[nn.Module]]:
    """Return runs of consecutive blocks whose working sets stay within the limit."""
    runs: list[list[nn.Module]] = []
    layers: list[LayerUse] = []
    for child_name, child in container.named_children():
        own = [use for use in measured.layers if use.name.startswith(f"{name}.{child_name}.")]
        if runs and working_set_bytes([*layers, *own]) <= limit_bytes:
            runs[-1].append(child)
            layers += own
        else:
            runs.append([child])
            layers = own
    return runs


def _run_in_turn(runs: Sequence[Sequence[nn.Module]], value: Any) -> Any:
    for run in runs:
        value = _run_twice(run, partial(_chain, run), value)
    return value


def _chain(modules: Sequence[nn.Module], value: Any) -> Any:
    for module in modules:
        value = module(value)
    return value


def _run_twice(
    modules: Sequence[nn.Module], function: Callable[..., Any], *arguments: Any, **keywords: Any
) -> Any:
    """Run `function` now and, where gradients are wanted, again in backward."""
    if not torch.is_grad_enabled():
        return function(*arguments, **keywords)
    again = _BuffersAsBefore(modules)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), again

    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts, **keywords)


_Buffers = list[dict[str, torch.Tensor | None]]


class _BuffersAsBefore(AbstractContextManager[None]):
    """Inside it, modules have copies of the buffers that they had when it was made."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners = [inner for module in modules for inner in module.modules()]
        self._before = _copied([owner._buffers for owner in self._owners])
        self._real: _Buffers = []

    def __enter__(self) -> None:
        self._real = [dict(owner._buffers) for owner in self._owners]
        for owner, copies in zip(self._owners, _copied(self._before), strict=True):
            owner._buffers.update(copies)

    def __exit__(self, *exception: object) -> None:
        for owner, real in zip(self._owners, self._real, strict=True):
            owner._buffers.update(real)


def _copied(buffers: _Buffers) -> _Buffers:
    """Return copies, all of a dtype made at once: a GPU waits for launches where blocks are small.

    One by one they were about a tenth of a step of ResNet-50 at 512 pixels on an H200, by sampled
    stacks; together they have not been timed there.
    """
    copies: _Buffers = [dict.fromkeys(each) for each in buffers]
    by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for mine, each in zip(copies, buffers, strict=True):
        for name, buffer in each.items():
            if buffer is not None:
                mine[name] = copy = torch.empty_like(buffer)
                targets, sources = by_dtype.setdefault(buffer.dtype, ([], []))
                targets.append(copy)
                sources.append(buffer)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)
    return copies
