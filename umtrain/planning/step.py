"""What one training step does, operation by operation: all that the planner knows of a network."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

Phase = Literal["forward", "backward", "optimizer"]
Kind = Literal["parameter", "buffer", "input", "gradient", "state", "saved", "temporary"]


@dataclass(frozen=True)
class Convolution:
    """The shape of a convolution: what its speed depends on besides its size."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    output: tuple[int, ...]  # its batch and spatial sizes, rows first

    @property
    def flops(self) -> float:
        """Return the multiplications and additions of a forward run."""
        per_output = 2 * self.in_channels // self.groups * math.prod(self.kernel)
        return float(per_output * self.out_channels * math.prod(self.output))

    @property
    def n_weights(self) -> int:
        """Return how many weights there are, without a bias."""
        n_sources = self.in_channels // self.groups
        return math.prod(self.kernel) * n_sources * self.out_channels

    @property
    def layer(self) -> "Convolution":
        """Return the convolution for maps of any size."""
        return replace(self, output=())


@dataclass(frozen=True)
class Operation:
    """One call of a kernel.

    `name` is aten's, without overload ("convolution", "native_batch_norm_backward"); `layer` the
    leaf module that called it, "" for none. Bytes are those of its distinct operands and results.
    """

    name: str
    layer: str
    phase: Phase
    dtype: str  # "bf16", "fp32", "fp64": what it computes in
    flops: float
    read_bytes: int
    written_bytes: int
    convolution: Convolution | None = None

    @property
    def has_source_gradient(self) -> bool:
        """Return whether it is a convolution's backward that finds its source's gradient too."""
        shape = self.convolution
        return shape is not None and self.phase == "backward" and self.flops > 1.5 * shape.flops


class Save(NamedTuple):
    """Autograd saves a storage before or in the operation `at`.

    `layer_kind` is the kind of the layer that does ("Conv2d") if the tensor has the shape of its
    input, else "".
    """

    at: int
    layer_kind: str


@dataclass(frozen=True)
class Allocation:
    """A storage, alive from the operation `first` to the operation `last`, both included.

    `touched` are the operations that read or write it, in order. Where autograd saves it, `saves`
    says when, and `saved_until` is the last forward operation that reads it. What was there
    before the step, or will be after it, is alive in all of it: parameters, buffers, the input,
    the optimizer's state.
    """

    n_bytes: int
    kind: Kind
    first: int
    last: int
    layer: str
    touched: tuple[int, ...] = ()
    saves: tuple[Save, ...] = ()
    saved_until: int | None = None

    @property
    def needed(self) -> tuple[int, ...]:
        """Return the operations after forward that touch it, if it is saved."""
        until = self.saved_until
        return () if until is None else tuple(i for i in self.touched if i > until)


@dataclass(frozen=True)
class StepTrace:
    """A step: forward, backward and update. Indices of allocations are into `operations`."""

    operations: list[Operation]
    allocations: list[Allocation] = field(default_factory=list)

    @cached_property
    def n_forward(self) -> int:
        """Return the number of operations before backward."""
        return sum(operation.phase == "forward" for operation in self.operations)

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of the model, buffers included."""
        return self._bytes_of("parameter", "buffer")

    @property
    def input_bytes(self) -> int:
        """Return the bytes of the batch that the network is given."""
        return self._bytes_of("input")

    @property
    def saved_bytes(self) -> int:
        """Return the bytes that autograd saves, parameters left out."""
        return self._bytes_of("saved")

    def _bytes_of(self, *kinds: Kind) -> int:
        return sum(each.n_bytes for each in self.allocations if each.kind in kinds)

    def live_bytes(self) -> list[int]:
        """Return the bytes alive during each operation."""
        changes = [0] * (len(self.operations) + 1)
        for allocation in self.allocations:
            changes[allocation.first] += allocation.n_bytes
            changes[allocation.last + 1] -= allocation.n_bytes
        live, total = [], 0
        for change in changes[:-1]:
            total += change
            live.append(total)
        return live
