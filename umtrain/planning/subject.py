"""A network and a batch, with all that was found out about a step of theirs, found out once."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from umtrain.memory.checkpoint import recomputing
from umtrain.memory.grouping import Group, make_groups
from umtrain.memory.options import Options
from umtrain.memory.tensors import planned_device
from umtrain.memory.working_set import WorkingSets, measure_working_sets
from umtrain.planning.profile import Profile
from umtrain.planning.seconds import step_seconds
from umtrain.planning.step import StepTrace
from umtrain.planning.tracing import ADAM_STATES, Loss, mean_square, trace_step


@dataclass
class Subject:
    """What is planned: a step of `model` on a batch like `sample_batch`, in fp32 or bf16.

    The optimizer holds `n_states` numbers for each parameter: AdamW 2, SGD with momentum 1.
    Raises ConfigError, from its methods, for a model that cannot run without data.
    """

    model: nn.Module
    sample_batch: Any
    precision: str
    loss: Loss = mean_square
    n_states: int = ADAM_STATES
    _traces: dict[tuple[object, ...], StepTrace] = field(default_factory=dict, repr=False)
    _seconds: dict[tuple[int, str], list[float]] = field(default_factory=dict, repr=False)
    _measured: WorkingSets | None = field(default=None, repr=False)

    def trace(self) -> StepTrace:
        """Return an ordinary step."""
        return self._traced((), None)

    def recomputed(self, options: Options) -> StepTrace:
        """Return a step under memory=checkpoint."""
        key = ("checkpoint", options.grouping, options.group_bytes, options.device_budget_bytes)
        return self._traced(key if options.grouping == "equal" else key[:2], options)

    def _traced(self, key: tuple[object, ...], options: Options | None) -> StepTrace:
        if key not in self._traces:
            around = None
            if options is not None:
                around = recomputing(self.model, self.sample_batch, options)
            self._traces[key] = trace_step(
                self.model,
                self.sample_batch,
                precision=self.precision,
                loss=self.loss,
                n_states=self.n_states,
                around=around,
            )
        return self._traces[key]

    def seconds(self, trace: StepTrace, profile: Profile) -> list[float]:
        """Return what each operation of one of this subject's traces adds to a step's seconds."""
        key = id(trace), profile.name
        if key not in self._seconds:
            self._seconds[key] = step_seconds(trace.operations, profile)
        return self._seconds[key]

    def measured(self) -> WorkingSets:
        """Return the working sets, as strategies see them when they are attached."""
        if self._measured is None:
            with self.autocast():
                self._measured = measure_working_sets(self.model, self.sample_batch)
        return self._measured

    def groups(self, options: Options) -> list[Group]:
        """Return the groups that swapping and paging go by."""
        return make_groups(self.model, self.measured(), options)

    def autocast(self) -> torch.autocast:
        """Return the context in which training calls the model."""
        kind = planned_device(self.model).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")
