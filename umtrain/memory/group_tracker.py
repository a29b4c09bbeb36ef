"""Follow a step through its groups: which one runs forward, which one backward has reached."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from umtrain.memory.grouping import Group
from umtrain.memory.trace import Lane, Trace, now_s
from umtrain.memory.working_set import leaf_modules


class GroupTracker:
    """Calls back when forward or backward enters a group; `current` is where the step is.

    A layer that runs several times in a step belongs to a different group each time.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], trace: Trace) -> None:
        self.groups = groups
        self.on_forward_entry: Callable[[int], None] = lambda group: None
        self.on_backward_entry: Callable[[int], None] = lambda group: None
        self._trace = trace
        self._model = model
        self._calls: Counter[str] = Counter()
        self._group_of: dict[tuple[str, int], int] = {}
        self._start_s = 0.0
        self._lane: Lane = "forward"
        self.current = 0
        calls: Counter[str] = Counter()
        for index, group in enumerate(groups):
            for layer in group.layers:
                self._group_of[layer.name, calls[layer.name]] = index
                calls[layer.name] += 1

    def start_step(self) -> None:
        """Begin a forward pass."""
        self._calls.clear()
        self.current = 0
        self._lane = "forward"
        self._start_s = now_s()

    def attach(self) -> Callable[[], None]:
        """Follow the model from now on; returns what ends it."""
        stack = ExitStack()
        for name, module in leaf_modules(self._model):
            stack.callback(module.register_forward_pre_hook(self._make_hook(name)).remove)
        return stack.close

    def _make_hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, arguments: Any) -> None:
            group = self._group_of.get((name, self._calls[name]), self.current)
            self._calls[name] += 1
            if group != self.current or self._lane == "backward":
                self._move_to(group, "forward")
                self.on_forward_entry(group)

        return enter

    def backward_reads(self, group: int) -> None:
        """Note that backward reads what `group` saved."""
        if self._lane == "forward" or group != self.current:
            self._move_to(group, "backward")
            self.on_backward_entry(group)

    def end_step(self) -> None:
        """Close the span of the group that ran last."""
        self._move_to(self.current, self._lane)

    def _move_to(self, group: int, lane: Lane) -> None:
        self._trace.add(self._lane, self.groups[self.current].name, self._start_s)
        self.current, self._lane, self._start_s = group, lane, now_s()
