"""Memory strategies for any `nn.Module` and any training loop.

>>> from umtrain import memory
>>> strategy = memory.create("um_group_prefetch", device_budget="2GiB")
>>> model = strategy.prepare(model, sample_batch)
>>> with strategy.step():
...     criterion(model(x), y).backward()
>>> strategy.stats()

Adding a strategy is one new file, one YAML and one line of `_REGISTRY`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from umtrain.errors import ConfigError

if TYPE_CHECKING:
    from umtrain.memory.base import Strategy
    from umtrain.memory.options import Options

_REGISTRY = {
    "auto": ("umtrain.planning.auto", "Auto"),
    "vanilla": ("umtrain.memory.vanilla", "Vanilla"),
    "placement": ("umtrain.memory.placement", "Placement"),
    "vdnn": ("umtrain.memory.vdnn", "Vdnn"),
    "lms": ("umtrain.memory.lms", "LargeModelSupport"),
    "um": ("umtrain.memory.um", "UnifiedMemory"),
    "um_group": ("umtrain.memory.um_group", "GroupedUnifiedMemory"),
    "um_group_prefetch": ("umtrain.memory.um_group_prefetch", "PrefetchedUnifiedMemory"),
    "checkpoint": ("umtrain.memory.checkpoint", "Checkpoint"),
    "stream": ("umtrain.memory.stream", "Stream"),
}

STRATEGIES = tuple(_REGISTRY)


def create(name: str, **options: Any) -> "Strategy":
    """Return the strategy called `name`, not yet attached to a model.

    `options` are the fields of `umtrain.memory.options.Options`: `device` ("cpu" or "cuda"),
    `device_budget` and `host_budget` (bytes, or text such as "2GiB"; None is all there is),
    `spill_dir`, `grouping` ("blocks" or "equal"), `group_bytes`, `prefetch_depth`, `policy`,
    `cpu_layers`, `oversubscribe` (let `um*` take more managed memory than the GPU has free) and
    `trace` (the folder for trace.json and timeline.png).

    Raises ConfigError for an unknown strategy, option or value, and DeviceError if this
    machine lacks what the strategy needs.
    """
    if name not in _REGISTRY:
        raise ConfigError(
            f"memory={name} is no memory strategy; choose one of {', '.join(STRATEGIES)}"
        )
    from umtrain.memory.options import Options

    return create_from(name, Options.parse(**options))


def create_from(name: str, options: "Options") -> "Strategy":
    """Return the strategy called `name`, one of `STRATEGIES`, for options that were parsed."""
    module_name, class_name = _REGISTRY[name]
    strategy_class = getattr(import_module(module_name), class_name)
    strategy: Strategy = strategy_class(options)
    return strategy
