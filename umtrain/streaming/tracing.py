"""From a module to programs: what can be streamed, what cannot (by name), and where to cut.

The module is traced with torch.fx down to layers and functions. Each of them is streamable or
not; the graph is split where that changes, so that what is not runs whole between the rest.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn import functional

from umtrain.errors import ConfigError

_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Softplus,
    nn.Mish,
    nn.Identity,
)
_POINTWISE_FUNCTIONS: set[Any] = {
    functional.relu,
    functional.relu6,
    functional.leaky_relu,
    functional.elu,
    functional.silu,
    functional.gelu,
    functional.sigmoid,
    functional.tanh,
    functional.hardswish,
    functional.hardsigmoid,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    torch.add,
    torch.sub,
    torch.mul,
    operator.add,
    operator.iadd,
    operator.sub,
    operator.mul,
    operator.imul,
    operator.truediv,
    operator.neg,
}
ADDITIONS = (torch.add, operator.add, operator.iadd)
_METHODS: dict[str, Any] = {
    "relu": torch.relu,
    "relu_": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "add": torch.add,
    "add_": torch.add,
    "mul": torch.mul,
    "mul_": torch.mul,
}
_IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.imul: operator.mul}
_LAYER_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    functional.interpolate: nn.Upsample,
    functional.max_pool2d: nn.MaxPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    functional.max_pool3d: nn.MaxPool3d,
    functional.avg_pool3d: nn.AvgPool3d,
}
# Each in 2D and in 3D.
Convolutions = nn.Conv2d | nn.Conv3d
BatchNorms = nn.BatchNorm2d | nn.BatchNorm3d
InstanceNorms = nn.InstanceNorm2d | nn.InstanceNorm3d
MaxPools = nn.MaxPool2d | nn.MaxPool3d
AveragePools = nn.AvgPool2d | nn.AvgPool3d
GlobalAverages = nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d
GlobalMaxima = nn.AdaptiveMaxPool2d | nn.AdaptiveMaxPool3d
_Norms = BatchNorms | nn.GroupNorm | InstanceNorms
_IN_3D = (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)


class _Tracer(fx.Tracer):
    """Stops at the layers that the engine knows, our own norms included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_ours = isinstance(m, _Norms) or _is_upsampling(m)
        return is_ours or super().is_leaf_module(m, module_qualified_name)


@dataclass
class Traced:
    """A module cut into parts that run one after another; `streamed` names those to stream."""

    parts: fx.GraphModule
    streamed: list[str]
    whole: list[str] = field(default_factory=list)


def trace(model: nn.Module) -> Traced:
    """Return `model` cut into parts; raises ConfigError if nothing of it can be streamed."""
    _refuse_hooks(model)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ConfigError(
            f"memory=stream cannot follow {type(model).__name__}: {error}; torch.fx must be able "
            "to trace it (no control flow that depends on values). Use another memory strategy"
        ) from error
    traced = fx.GraphModule(model, graph)
    modules = dict(traced.named_modules())
    vectors = _vectors(graph, modules)
    stages = _stages(graph, modules, vectors)
    whole = [
        _describe(node, modules)
        for node, stage in stages.items()
        if stage % 2 == 1 and node.op != "get_attr" and node not in vectors
    ]
    parts = split_module(traced, model, lambda node: stages[node], keep_original_order=True)
    streamed = [f"submod_{stage}" for stage in sorted(set(stages.values())) if stage % 2 == 0]
    if not streamed:
        raise ConfigError(
            f"memory=stream finds nothing to stream in {type(model).__name__}; "
            f"it holds {', '.join(sorted(set(whole)))}. Use another memory strategy"
        )
    return Traced(parts, streamed, whole)


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if module is not model and any(hooks):
            raise ConfigError(
                f"memory=stream: layer {name!r} has hooks, which would not run, as its feature "
                "maps never exist as a whole; remove them, or use another memory strategy"
            )


def _vectors(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Return the nodes behind a global pooling: small, and nothing to stream."""
    vectors: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if _is_global_pooling(node, modules) or (inputs and vectors.issuperset(inputs)):
            vectors.add(node)
    return vectors


def _stages(
    graph: fx.Graph, modules: dict[str, nn.Module], vectors: set[fx.Node]
) -> dict[fx.Node, int]:
    """Number the nodes so that streamed ones are even and edges never go down."""
    stages: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        reads_vector = not vectors.isdisjoint(node.all_input_nodes)
        odd = 0 if is_streamable(node, modules) and not reads_vector else 1
        before = [stages[argument] for argument in node.all_input_nodes if argument in stages]
        stage = max(before, default=0)
        stages[node] = stage if stage % 2 == odd else stage + 1
    return stages


def is_streamable(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether the engine runs this node strip by strip."""
    module = as_module(node, modules)
    if module is not None:
        return _module_is_streamable(module)
    if node.op == "call_method":
        return node.target in _METHODS and _has_map(node)
    return node.op == "call_function" and _function_is_streamable(node)


def _is_global_pooling(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    pooling = as_module(node, modules)
    return isinstance(pooling, GlobalAverages | GlobalMaxima)


def _has_map(node: fx.Node) -> bool:
    inputs = node.all_input_nodes
    return bool(inputs) and not any(argument.op == "get_attr" for argument in inputs)


def _function_is_streamable(node: fx.Node) -> bool:
    if node.target in (torch.cat, torch.concat):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return dim in (1, -3) and _has_map(node)
    return node.target in _POINTWISE_FUNCTIONS and _has_map(node)


def as_module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the layer that a node is, also where the model calls it as a function; else None."""
    if node.op == "call_module":
        return modules[str(node.target)]
    maker = _LAYER_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if maker is None:
        return None
    arguments = [value for value in node.args if not isinstance(value, fx.Node)]
    try:
        return maker(*arguments, **{k: v for k, v in node.kwargs.items() if k != "input"})
    except TypeError:
        return None  # an argument that the layer has not


def pair(value: Any) -> tuple[Any, Any]:
    """Return a size for rows and columns, given as one number or two."""
    return (value, value) if not isinstance(value, tuple | list) else (value[0], value[1])


def sizes(value: Any, module: nn.Module) -> tuple[int, ...]:
    """Return a size for each dimension that `module` slides over, given as one or as all."""
    n_dims = 3 if isinstance(module, _IN_3D) else 2
    return (value,) * n_dims if not isinstance(value, tuple | list) else tuple(value)


def whole_factors(scale: Any) -> tuple[int, int] | None:
    """Return upsampling factors if they are whole numbers, else None."""
    if scale is None:
        return None
    rows, columns = pair(scale)
    if float(rows).is_integer() and float(columns).is_integer() and min(rows, columns) >= 1:
        return int(rows), int(columns)
    return None


def _module_is_streamable(module: nn.Module) -> bool:
    kind = type(module)
    if kind in get_args(Convolutions):
        return module.padding_mode == "zeros" and module.padding not in ("same",)
    if isinstance(module, BatchNorms):
        return (
            kind in get_args(BatchNorms)
            or hasattr(module, "eval_statistics")
            or not module.training
        )
    if kind is nn.GroupNorm or kind in get_args(InstanceNorms):
        return True
    if isinstance(module, MaxPools):
        return not module.return_indices
    if isinstance(module, AveragePools):
        padded = any(sizes(module.padding, module))
        return not module.ceil_mode and (bool(module.count_include_pad) or not padded)
    if isinstance(module, GlobalAverages | GlobalMaxima):
        is_global = all(size == 1 for size in sizes(module.output_size, module))
        return is_global and not getattr(module, "return_indices", False)
    if _is_upsampling(module):
        bilinear = module.mode == "bilinear" and not module.align_corners
        factors = whole_factors(module.scale_factor)
        return factors is not None and (module.mode == "nearest" or bilinear)
    return kind in _POINTWISE_MODULES or kind is nn.Dropout


def _is_upsampling(module: nn.Module) -> bool:
    """Return whether a module enlarges as torch's does; one derived from it has to say so."""
    is_known = type(module) is nn.Upsample or getattr(module, "keeps_dtype", False)
    return isinstance(module, nn.Upsample) and is_known


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} ({node.target})"
    return getattr(node.target, "__name__", str(node.target))


def pointwise_function(node: fx.Node, modules: dict[str, nn.Module]) -> Callable[..., Tensor]:
    """Return a pointwise node's function, never one that changes its argument."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return _without_in_place(module)
    if node.op == "call_method":
        method: Callable[..., Tensor] = _METHODS[str(node.target)]
        return method
    function: Callable[..., Tensor] = _IN_PLACE.get(node.target, node.target)
    return function


def _without_in_place(module: nn.Module) -> Callable[..., Tensor]:
    if not getattr(module, "inplace", False):
        return module
    out_of_place = type(module).__new__(type(module))
    out_of_place.__dict__ = module.__dict__ | {"inplace": False}
    return out_of_place
