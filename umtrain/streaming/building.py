"""From a traced part of a network to a program: which values become maps.

What an operation with neighbours or a normalisation reads from, and what is read in several
places and costs more than a pass to make, is a map. The rest are expressions.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from umtrain.errors import ConfigError
from umtrain.streaming import tracing
from umtrain.streaming.operations import (
    AveragePooling,
    Convolution,
    GlobalPooling,
    MaxPooling,
    Operation,
    Upsampling,
)
from umtrain.streaming.program import (
    Blend,
    Concat,
    Expression,
    Map,
    Mask,
    Masked,
    Norm,
    Pointwise,
    Program,
    Segment,
    Term,
)
from umtrain.streaming.rows import Enlargement, Window
from umtrain.streaming.tracing import (
    AveragePools,
    BatchNorms,
    Convolutions,
    GlobalAverages,
    GlobalMaxima,
    InstanceNorms,
    MaxPools,
    as_module,
    sizes,
)
from umtrain.streaming.volumes import InPlanes, plane_of

_N_DIMS = (4, 5)  # of a feature map: images, volumes


class UnstreamableError(ConfigError):
    """A part of a network holds something that only its shapes show to be unstreamable."""


def build(part: fx.GraphModule, examples: Sequence[Tensor]) -> Program:
    """Return the program of a traced part for inputs like `examples` (fake tensors will do).

    Run it under the autocast that the program will run under. Raises UnstreamableError.
    """
    _Shapes(part).run(*examples)
    return _Builder(part).build()


class _Shapes(fx.Interpreter):
    """Runs a part and keeps what each node gave, as `meta["val"]`; changes no buffer."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        is_measured = module.training or getattr(module, "running_mean", None) is None
        if not (isinstance(module, BatchNorms) and is_measured):
            return super().call_module(target, args, kwargs)
        return nn.functional.batch_norm(
            args[0], None, None, module.weight, module.bias, training=True
        )

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


class _Builder:
    def __init__(self, part: fx.GraphModule) -> None:
        self._part = part
        self._modules = dict(part.named_modules())
        self._program = Program()
        self._values: dict[fx.Node, Expression] = {}
        self._pooled: dict[fx.Node, int] = {}

    def build(self) -> Program:
        for node in self._part.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._input(node)
            elif node.op == "output":
                self._output(node)
            elif node.op != "get_attr":
                self._node(node)
        return self._program

    def _input(self, node: fx.Node) -> Expression:
        value = node.meta["val"]
        if (
            not isinstance(value, Tensor)
            or value.ndim not in _N_DIMS
            or not value.is_floating_point()
        ):
            raise UnstreamableError(f"{node.name} is no feature map")
        index = self._new_map(node)
        self._program.inputs.append(index)
        return self._plain(index)

    def _new_map(self, node: fx.Node, dtype: torch.dtype | None = None) -> int:
        value = node.meta["val"]
        if value.ndim not in _N_DIMS:
            raise UnstreamableError(f"{node.name} has shape {tuple(value.shape)}")
        maps = self._program.maps
        shape, plane = _folded_shape(value), plane_of(value)
        maps.append(Map(len(maps), node.name, shape, dtype or value.dtype, plane))
        return len(maps) - 1

    def _plain(self, index: int) -> Blend:
        return Blend((Term(index),), False, self._program.maps[index].dtype)

    def _output(self, node: fx.Node) -> None:
        returned = node.args[0]
        for value in returned if isinstance(returned, tuple | list) else (returned,):
            assert isinstance(value, fx.Node)
            if value in self._pooled:
                self._program.outputs.append(("pooled", self._pooled[value]))
            else:
                self._program.outputs.append(("map", self._materialised(value)))

    def _node(self, node: fx.Node) -> None:
        module = as_module(node, self._modules)
        if isinstance(module, GlobalAverages | GlobalMaxima):
            self._pool_globally(node, module)
            return
        if isinstance(module, BatchNorms | nn.GroupNorm | InstanceNorms):
            value: Expression = self._normalise(node, module)
        elif isinstance(module, nn.Dropout):
            value = self._drop(node, module)
        elif isinstance(module, nn.Identity):
            value = self._argument(node, 0)
        elif node.target in (torch.cat, torch.concat):
            value = self._concatenate(node)
        elif module is not None and (operation := _operation(node, module)) is not None:
            value = self._plain(self._operate(node, module, operation))
        else:
            value = self._pointwise(node, module)
        self._values[node] = value
        if self._should_be_a_map(node, value):
            self._materialised(node)

    def _argument(self, node: fx.Node, position: int) -> Expression:
        argument = node.all_input_nodes[position]
        if argument not in self._values:
            raise UnstreamableError(f"{node.name} reads {argument.name}, which is no feature map")
        return self._values[argument]

    def _should_be_a_map(self, node: fx.Node, value: Expression) -> bool:
        """Several readers: worth holding if it takes two maps, or a sum could not read it."""
        if len(node.users) < 2 or isinstance(value, Concat):
            return False
        if isinstance(value, Blend):
            summed = value.relu and any(_is_addition(user) for user in node.users)
            return len(value.terms) > 1 or summed
        return True

    def _materialised(self, node: fx.Node) -> int:
        """Return the map that holds the value of `node`, made now if there is none."""
        value = self._values[node]
        if isinstance(value, Blend) and len(value.terms) == 1 and not value.relu:
            term = value.terms[0]
            if term.norm is None:
                return term.map
        index = self._new_map(node)
        self._add_segment(node, value, None, index)
        self._values[node] = self._plain(index)
        return index

    def _add_segment(
        self,
        node: fx.Node,
        source: Expression,
        operation: Operation | None,
        out: int | None,
        pooled: int | None = None,
        module: nn.Module | None = None,
    ) -> None:
        shape = self._shape_of(node, operation)
        dtype = source.dtype if out is None else self._program.maps[out].dtype
        segments = self._program.segments
        segment = Segment(
            len(segments), node.name, source, shape, dtype, operation, out, pooled, module
        )
        segment.flops = _flops(node, module)
        segments.append(segment)

    def _shape_of(self, node: fx.Node, operation: Operation | None) -> tuple[int, int, int, int]:
        value = node.meta["val"] if operation is None else node.all_input_nodes[0].meta["val"]
        return _folded_shape(value)

    def _operate(self, node: fx.Node, module: nn.Module, operation: Operation) -> int:
        source = self._argument(node, 0)
        index = self._new_map(node)
        learned = module if isinstance(module, Convolutions) else None
        self._add_segment(node, source, operation, index, module=learned)
        return index

    def _pool_globally(self, node: fx.Node, module: nn.Module) -> None:
        kind = "avg" if isinstance(module, GlobalAverages) else "max"
        value = node.meta["val"]
        index = len(self._program.pooled)
        self._program.pooled.append((tuple(value.shape), value.dtype))
        source = self._argument(node, 0)
        operation = GlobalPooling(kind, math.prod(node.all_input_nodes[0].meta["val"].shape[2:]))
        self._add_segment(node, source, operation, None, pooled=index)
        self._pooled[node] = index

    def _normalise(self, node: fx.Node, module: nn.Module) -> Blend:
        index = self._materialised(node.all_input_nodes[0])
        groups, domain = 1, "image"
        is_updating = False
        if isinstance(module, nn.GroupNorm):
            groups, domain = module.num_groups, "group"
        elif isinstance(module, BatchNorms):
            domain = _batch_domain(module)
            is_updating = module.training and module.track_running_stats
        elif isinstance(module, InstanceNorms) and module.track_running_stats:
            raise UnstreamableError(f"{node.name} tracks running statistics per image")
        norms = self._program.norms
        eps = float(getattr(module, "eps", 1e-5))
        norms.append(Norm(len(norms), index, module, domain, groups, eps, is_updating))
        return Blend((Term(index, len(norms) - 1),), False, node.meta["val"].dtype)

    def _drop(self, node: fx.Node, module: nn.Dropout) -> Expression:
        value = self._argument(node, 0)
        if not module.training or module.p == 0:
            return value
        if module.p == 1:
            raise UnstreamableError(f"{node.name} drops everything")
        mask = self._new_map(node, torch.bool)
        keep = 1 - module.p
        self._program.masks.append(Mask(mask, keep, len(self._program.segments)))
        return Masked(value, mask, 1 / keep)

    def _concatenate(self, node: fx.Node) -> Concat:
        parts = tuple(self._argument(node, i) for i in range(len(node.all_input_nodes)))
        listed = node.kwargs.get("tensors", node.args[0] if node.args else ())
        if list(node.all_input_nodes) != list(cast(Sequence[fx.Node], listed)):
            raise UnstreamableError(f"{node.name} concatenates a value with itself")
        value = node.meta["val"]
        if sum(part.meta["val"].shape[1] for part in node.all_input_nodes) != value.shape[1]:
            raise UnstreamableError(
                f"memory=stream: {node.name} concatenates along another dimension than the "
                "channels, which is not streamed; use another memory strategy"
            )
        return Concat(parts, value.dtype)

    def _pointwise(self, node: fx.Node, module: nn.Module | None) -> Expression:
        self._check_shapes(node)
        function = tracing.pointwise_function(node, self._modules)
        dtype = node.meta["val"].dtype
        if function is torch.relu or isinstance(module, nn.ReLU) or _is_relu(node):
            value = self._argument(node, 0)
            if isinstance(value, Blend):
                return Blend(value.terms, True, dtype)
            return Pointwise(node.name, torch.relu, (value,), dtype)
        if _is_addition(node) and len(node.all_input_nodes) == 2:
            terms = [self._as_term(argument) for argument in node.all_input_nodes]
            if terms[0].map != terms[1].map:
                return Blend(tuple(terms), False, dtype)
        return self._general(node, function, dtype)

    def _as_term(self, node: fx.Node) -> Term:
        """Return the value as one term of a sum; what is more than that becomes a map."""
        value = self._values[node]
        if isinstance(value, Blend) and len(value.terms) == 1 and not value.relu:
            return value.terms[0]
        return Term(self._materialised(node))

    def _general(self, node: fx.Node, function: Any, dtype: torch.dtype) -> Pointwise:
        """A function of strips, with the node's other arguments as they are."""
        inputs = node.all_input_nodes
        parts = tuple(self._argument(node, i) for i in range(len(inputs)))

        def apply(*strips: Tensor) -> Tensor:
            given = dict(zip(inputs, strips, strict=True))
            arguments = fx.map_arg(node.args, given.__getitem__)
            keywords = fx.map_arg(node.kwargs, given.__getitem__)
            result: Tensor = function(*arguments, **keywords)
            return result

        return Pointwise(node.name, apply, parts, dtype)

    def _check_shapes(self, node: fx.Node) -> None:
        shape = node.meta["val"].shape
        for argument in node.all_input_nodes:
            if argument.meta["val"].shape != shape:
                raise UnstreamableError(f"{node.name} broadcasts {argument.name}")


def _is_relu(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target is nn.functional.relu


def _is_addition(node: fx.Node) -> bool:
    """Return whether a node is the plain sum of its two inputs."""
    if node.op == "call_method":
        named = node.target in ("add", "add_")
    else:
        named = node.op == "call_function" and node.target in tracing.ADDITIONS
    return named and len(node.args) == 2 and not node.kwargs


def _batch_domain(module: BatchNorms) -> str:
    if module.training or module.running_mean is None:
        return "batch"
    return "image" if getattr(module, "eval_statistics", "running") == "image" else "fixed"


def _folded_shape(value: Tensor) -> tuple[int, int, int, int]:
    """Return the shape that the engine holds a map in. See Note: [Slices as rows]."""
    n_images, channels, rows, *rest = value.shape
    return n_images, channels, rows, math.prod(rest)


def _operation(node: fx.Node, module: nn.Module) -> Operation | None:
    operation = _sliding(node, module)
    source = node.all_input_nodes[0].meta["val"]
    plane, out_plane = plane_of(source), plane_of(node.meta["val"])
    if operation is None or plane is None or out_plane is None:
        return operation
    if isinstance(operation, Upsampling):
        raise UnstreamableError(
            f"memory=stream: {node.name} enlarges a volume, which is not streamed; use another "
            "memory strategy"
        )
    return InPlanes(operation, plane, out_plane)


def _sliding(node: fx.Node, module: nn.Module) -> Operation | None:
    if isinstance(module, Convolutions):
        padding = _convolution_padding(module)
        strides, dilation = sizes(module.stride, module), sizes(module.dilation, module)
        kernel = sizes(module.kernel_size, module)
        window = Window(kernel[0], strides[0], padding[0], dilation[0])
        return Convolution(window, strides, padding, dilation, module.groups)
    if isinstance(module, MaxPools):
        kernel, padding, dilation = (
            sizes(x, module) for x in (module.kernel_size, module.padding, module.dilation)
        )
        strides = kernel if module.stride is None else sizes(module.stride, module)
        window = Window(kernel[0], strides[0], padding[0], dilation[0])
        return MaxPooling(window, kernel, strides, padding, dilation, module.ceil_mode)
    if isinstance(module, AveragePools):
        kernel, padding = sizes(module.kernel_size, module), sizes(module.padding, module)
        strides = kernel if module.stride is None else sizes(module.stride, module)
        window = Window(kernel[0], strides[0], padding[0])
        return AveragePooling(window, kernel, strides, padding, module.divisor_override)
    if isinstance(module, nn.Upsample):
        factors = tracing.whole_factors(module.scale_factor)
        assert factors is not None
        n_rows = node.all_input_nodes[0].meta["val"].shape[2]
        halo = 0 if module.mode == "nearest" else 1
        return Upsampling(Enlargement(factors[0], halo, n_rows), factors, module.mode)
    return None


def _convolution_padding(module: Convolutions) -> tuple[int, ...]:
    if module.padding == "valid":
        return sizes(0, module)
    assert not isinstance(module.padding, str)
    return sizes(module.padding, module)


def _flops(node: fx.Node, module: nn.Module | None) -> float:
    """Return the operations of one forward run: multiplications and additions."""
    value = node.meta["val"]
    if isinstance(module, Convolutions):
        return 2.0 * float(value.numel()) * module.weight[0].numel()
    return 2.0 * float(value.numel())
