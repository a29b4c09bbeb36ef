"""Sums of gradients over all ranks, bucket by bucket, while backward goes on.

# Note: [Order of buckets]
# Ranks must start the same sums in the same order, whatever order gradients come in. So a bucket
# holds parameters that are fixed ahead, the last of the model first, as backward finds them; and
# it starts when it is full and all before it have started. What is still missing at the end of
# backward (nothing on this rank reached it) counts as zero. A flag behind each gradient is summed
# along: where no rank has set it there is no gradient, and `.grad` stays None, as it would in one
# process.

# Note: [Sums, not means]
# Each rank scales its loss by its share of the step's images, so gradients only have to be added;
# uneven shares need nothing more.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from umtrain.parallel.world import World

BUCKET_BYTES = 25 * 2**20


class _Bucket:
    """Gradients that are summed by one call: one after another, then a flag for each."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        first = parameters[0]
        self._flat = torch.zeros(
            sum(sizes) + len(parameters), dtype=first.dtype, device=first.device
        )
        ends = list(accumulate(sizes))
        self._slots = {
            id(parameter): self._flat[end - size : end]
            for parameter, size, end in zip(parameters, sizes, ends, strict=True)
        }
        self._flags = self._flat[ends[-1] :]
        self._arrived: set[int] = set()
        self._wait: Callable[[], None] | None = None

    @property
    def is_full(self) -> bool:
        return len(self._arrived) == len(self.parameters)

    @property
    def is_started(self) -> bool:
        return self._wait is not None

    def put(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient to what is summed."""
        slot = _like(self._slots[id(parameter)], parameter)
        if id(parameter) in self._arrived:
            slot.add_(gradient)
        else:
            slot.copy_(gradient)
        self._arrived.add(id(parameter))

    def start(self, world: World) -> None:
        """Begin the sum."""
        for i, parameter in enumerate(self.parameters):
            if id(parameter) not in self._arrived:
                self._slots[id(parameter)].zero_()
            self._flags[i] = float(id(parameter) in self._arrived)
        self._wait = world.start_total(self._flat)

    def finish(self) -> None:
        """Wait for the sum, and put it where the optimizer looks."""
        assert self._wait is not None
        self._wait()
        self._wait = None
        self._arrived.clear()
        for parameter, flag in zip(self.parameters, self._flags.tolist(), strict=True):
            if flag:
                parameter.grad = _like(self._slots[id(parameter)], parameter)


def _like(slot: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a flat slot as a tensor of the parameter's shape and strides, without a copy."""
    return slot.as_strided(parameter.shape, parameter.stride(), slot.storage_offset())


class GradientSums:
    """Sums the gradients of a model's parameters over all ranks.

    Between `start`, before the last backward pass of a step, and `finish`, after it, gradients are
    taken as they are found: from autograd's hooks, or handed in by `take`. Gradients that earlier
    passes of the step left in `.grad` are part of the sum.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], world: World, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._world = world
        self._is_open = False
        learned = [parameter for parameter in parameters if parameter.requires_grad]
        self._buckets = [_Bucket(part) for part in _parts(learned, bucket_bytes)]
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._late: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks = [_call_after_accumulation(p, self._on_accumulated) for p in learned]

    def start(self) -> None:
        """Take gradients from now on."""
        self._is_open = True

    def take(self, parameter: nn.Parameter, gradient: Tensor) -> bool:
        """Take over a gradient that backward is done with; return whether it was taken.

        A parameter that two parts of a network share comes twice; what comes once its bucket is on
        its way is summed at the end.
        """
        if not self._is_open or id(parameter) not in self._bucket_of:
            return False
        before, parameter.grad = parameter.grad, None
        for part in (before, gradient):
            if part is not None:
                self._enter(parameter, part)
        self._start_full()
        return True

    def _enter(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        bucket = self._bucket_of[id(parameter)]
        if bucket.is_started:
            self._late.append((parameter, gradient.to(parameter.dtype).contiguous()))
        else:
            bucket.put(parameter, gradient)

    def finish(self) -> None:
        """Wait until every `.grad` holds the sum over all ranks."""
        self._is_open = False
        for bucket in self._buckets:
            if not bucket.is_started:
                self._enter_earlier(bucket)
                bucket.start(self._world)
        waits = [self._world.start_total(gradient) for _, gradient in self._late]
        for bucket in self._buckets:
            bucket.finish()
        for wait, (parameter, gradient) in zip(waits, self._late, strict=True):
            wait()
            assert parameter.grad is not None
            parameter.grad += gradient.view_as(parameter)
        self._late.clear()

    def _enter_earlier(self, bucket: _Bucket) -> None:
        """Add what earlier passes of the step left, for parameters that the last did not reach."""
        for parameter in bucket.parameters:
            if parameter.grad is not None:
                bucket.put(parameter, parameter.grad)
                parameter.grad = None

    def close(self) -> None:
        """Leave the parameters alone."""
        for hook in self._hooks:
            hook.remove()

    def _on_accumulated(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is not None and self._is_open:
            parameter.grad = None
            self.take(parameter, gradient)

    def _start_full(self) -> None:
        """See Note: [Order of buckets]."""
        for bucket in self._buckets:
            if bucket.is_started:
                continue
            if not bucket.is_full:
                return
            bucket.start(self._world)


def _parts(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Cut the parameters, last first, into runs of one dtype and device near `bucket_bytes`."""
    parts: list[list[nn.Parameter]] = []
    filled_bytes = 0
    for parameter in reversed(parameters):
        like_last = parts and _kind(parts[-1][-1]) == _kind(parameter)
        if not like_last or filled_bytes + parameter.nbytes > bucket_bytes:
            parts.append([])
            filled_bytes = 0
        parts[-1].append(parameter)
        filled_bytes += parameter.nbytes
    return parts


def _call_after_accumulation(parameter: nn.Parameter, hook: Callable[[nn.Parameter], None]) -> Any:
    register: Any = parameter.register_post_accumulate_grad_hook
    return register(hook)


def _kind(parameter: nn.Parameter) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device
