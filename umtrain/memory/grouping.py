"""Groups: consecutive layers that are executed, swapped and prefetched as one unit.

`blocks` follows the network's own blocks; `equal` unites consecutive layers while their joint
working set stays within a limit. A quarter of device memory as the limit is what HMS, aetherAI's
system, used: a good start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from umtrain.memory.options import Options
from umtrain.memory.working_set import LayerUse, WorkingSets, working_set_bytes
from umtrain.units import format_bytes

_SHARE_OF_DEVICE = 4
_GROUPS_WITHOUT_BUDGET = 16


@dataclass(frozen=True)
class Group:
    """Consecutive layer calls, as a range of the forward pass's order."""

    name: str
    layers: tuple[LayerUse, ...]

    @property
    def working_set_bytes(self) -> int:
        """Return the bytes that the group's backward pass touches."""
        return working_set_bytes(self.layers)


def make_groups(model: nn.Module, measured: WorkingSets, options: Options) -> list[Group]:
    """Return the groups of `model` that `options.grouping` asks for, in forward order."""
    if options.grouping == "equal":
        return group_equally(measured.layers, group_limit_bytes(measured, options))
    return group_by_blocks(model, measured.layers)


def group_limit_bytes(measured: WorkingSets, options: Options) -> int:
    """Return the working set that `grouping=equal` keeps groups within."""
    if options.group_bytes is not None:
        return options.group_bytes
    if options.device_budget_bytes is not None:
        return options.device_budget_bytes // _SHARE_OF_DEVICE
    return working_set_bytes(measured.layers) // _GROUPS_WITHOUT_BUDGET


def group_equally(layers: Sequence[LayerUse], limit_bytes: int) -> list[Group]:
    """Unite consecutive layers while their working set stays within `limit_bytes`.

    A layer that is larger than that by itself is a group of its own.
    """
    groups: list[list[LayerUse]] = []
    for layer in layers:
        if groups and working_set_bytes([*groups[-1], layer]) <= limit_bytes:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return [Group(_span_name(group), tuple(group)) for group in groups]


def _span_name(layers: Sequence[LayerUse]) -> str:
    first, last = layers[0].name, layers[-1].name
    return first if len(layers) == 1 else f"{first} … {last}"


def group_by_blocks(model: nn.Module, layers: Sequence[LayerUse]) -> list[Group]:
    """Unite consecutive layers of the same block; layers outside blocks unite with each other."""
    blocks = block_names(model)

    def block_of(layer: LayerUse) -> str:
        parts = layer.name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in blocks), "")

    united = [(block, tuple(run)) for block, run in groupby(layers, key=block_of)]
    return [Group(block or _span_name(run), run) for block, run in united]


def block_names(model: nn.Module) -> set[str]:
    """Return the network's own blocks: modules that compute, and are no mere container of blocks.

    Sequential, ModuleList and ModuleDict are looked into if they hold modules with children.
    """
    names: set[str] = set()
    _collect_blocks(model, "", names)
    return names


def _collect_blocks(module: nn.Module, prefix: str, names: set[str]) -> None:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not any(child.children()):
            continue
        is_container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if is_container and any(any(inner.children()) for inner in child.children()):
            _collect_blocks(child, f"{path}.", names)
        else:
            names.add(path)


def group_rows(groups: Sequence[Group]) -> list[tuple[str, int, str]]:
    """Return the table of groups: name, number of layers, working set as text."""
    return [(g.name, len(g.layers), format_bytes(g.working_set_bytes)) for g in groups]
