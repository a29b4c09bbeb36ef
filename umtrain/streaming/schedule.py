"""What a step does in which order, and from when to when each map and gradient is alive.

The order is known before the step starts: forward through all segments, then backward, group by
group, with the segments whose maps were not kept run again ahead of their group's backward. So is
every lifetime, and who may lie in whose place.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from umtrain.streaming.operations import Convolution
from umtrain.streaming.program import Blend, Map, Program, Segment, Term, masks_of, terms_of
from umtrain.streaming.volumes import InPlanes

Kind = Literal["forward", "again", "backward"]


class Action(NamedTuple):
    """One segment, run in one direction."""

    kind: Kind
    segment: int


@dataclass
class Buffer:
    """Room for one map or gradient, from action `first` to action `last`.

    `touches` are the actions that read or write it; `is_content` says that only the first writes.
    """

    name: str
    n_bytes: int
    first: int
    last: int
    is_content: bool = False
    touches: list[int] = field(default_factory=list)

    def touch(self, action: int) -> None:
        """Keep it alive until `action`, which reads or writes it."""
        self.last = max(self.last, action)
        self.touches.append(action)

    @property
    def pause(self) -> tuple[int, int] | None:
        """Return the longest time in which nothing reads it, if there is one.

        The last action before, and the one from which on it is there again: where there is time,
        one ahead of its reader, so that it comes back while another segment is run.
        """
        if not self.is_content:
            return None
        gaps = [(b - a, a, b) for a, b in pairwise(self.touches) if b - a > 1]
        if not gaps:
            return None
        length, before, reader = max(gaps)
        return before, reader - 1 if length > 2 else reader


class Needs:
    """Which gradients a step has to find, given what requires them."""

    def __init__(self, program: Program, inputs: Sequence[bool], training: bool) -> None:
        self._program = program
        self.of_map = [False] * len(program.maps)
        self.backward = [False] * len(program.segments)
        if not training:
            return
        for index, wanted in zip(program.inputs, inputs, strict=True):
            self.of_map[index] = wanted
        for segment in program.segments:
            learns = any(p.requires_grad for p in _parameters(segment.module))
            wanted = learns or any(self.of_term(term) for term in terms_of(segment.source))
            self.backward[segment.index] = wanted
            if segment.out is not None:
                self.of_map[segment.out] = wanted
        self._drop_what_nothing_reads()

    def of_term(self, term: Term) -> bool:
        """Return whether a gradient has to reach a use of a map."""
        return self.of_map[term.map] or self.of_norm(term.norm)

    def of_norm(self, norm: int | None) -> bool:
        """Return whether a normalisation learns."""
        if norm is None:
            return False
        return any(p.requires_grad for p in _parameters(self._program.norms[norm].module))

    def _drop_what_nothing_reads(self) -> None:
        outputs = {index for kind, index in self._program.outputs if kind == "map"}
        for segment in reversed(self._program.segments):
            if segment.out is None or segment.out in outputs:
                continue
            readers = self._program.consumers(segment.out)
            if not any(self.backward[reader] for reader in readers):
                self.backward[segment.index] = False
                self.of_map[segment.out] = False


def _parameters(module: torch.nn.Module | None) -> list[torch.nn.Parameter]:
    return [] if module is None else list(module.parameters(recurse=False))


@dataclass
class Schedule:
    """Actions in order, and the buffers that they use.

    `forward[m]`, `backward[m]` and `gradient[m]` number the buffers of map m's content in forward
    and in backward, and of its gradient. A map that is an input or output has no buffer here.
    """

    actions: list[Action] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    forward: dict[int, int] = field(default_factory=dict)
    backward: dict[int, int] = field(default_factory=dict)
    gradient: dict[int, int] = field(default_factory=dict)

    def live_bytes(self) -> list[int]:
        """Return how much is alive during each action."""
        change = [0] * (len(self.actions) + 1)
        for buffer in self.buffers:
            change[buffer.first] += buffer.n_bytes
            change[buffer.last + 1] -= buffer.n_bytes
        total, live = 0, []
        for step in change[:-1]:
            total += step
            live.append(total)
        return live


def groups_of(program: Program) -> list[range]:
    """Cut the segments where least is alive across the cut: a network's own blocks.

    A cut is where what is alive is no more than at the cuts beside it.
    """
    n = len(program.segments)
    last_use = {m.index: max(program.consumers(m.index), default=-1) for m in program.maps}
    alive = []
    for segment in range(n):
        made = [s.out for s in program.segments[: segment + 1] if s.out is not None]
        alive.append(sum(program.maps[m].n_bytes for m in made if last_use[m] > segment))
    cuts = [
        i + 1
        for i in range(n - 1)
        if (i == 0 or alive[i] <= alive[i - 1]) and alive[i] <= alive[i + 1]
    ]
    edges = [0, *cuts, n]
    return [range(first, last) for first, last in pairwise(edges) if last > first]


def inner_maps(program: Program, groups: Sequence[range]) -> dict[int, int]:
    """Return the maps that need not be kept, with their producers: made and read in one group."""
    group_of = {segment: g for g, group in enumerate(groups) for segment in group}
    outside = {index for kind, index in program.outputs if kind == "map"}
    found = {}
    for segment in program.segments:
        if segment.out is None or segment.out in outside:
            continue
        readers = {group_of[reader] for reader in program.consumers(segment.out)}
        if readers == {group_of[segment.index]}:
            found[segment.out] = segment.index
    return found


def make_schedule(
    program: Program, needs: Needs, groups: Sequence[range], again: Collection[int]
) -> Schedule:
    """Return the schedule in which the maps `again`, of `inner_maps`, are made twice, not kept."""
    return _Scheduler(program, needs, groups, again).make()


class _Scheduler:
    def __init__(
        self, program: Program, needs: Needs, groups: Sequence[range], again: Collection[int]
    ) -> None:
        self._program, self._needs, self._groups, self._inner = program, needs, groups, again
        self._schedule = Schedule()
        self._outside = {index for kind, index in program.outputs if kind == "map"}
        self._outside |= set(program.inputs)
        self._producer = {s.out: s.index for s in program.segments if s.out is not None}
        self._producer |= {mask.map: mask.segment for mask in program.masks}

    def make(self) -> Schedule:
        program, needs = self._program, self._needs
        for segment in program.segments:
            self._run_forward("forward", segment, self._schedule.forward)
        for group in reversed(range(len(self._groups))):
            for index in self._groups[group]:
                out = program.segments[index].out
                if self._is_made_again(out):
                    self._run_forward("again", program.segments[index], self._schedule.backward)
            for index in reversed(self._groups[group]):
                if needs.backward[index]:
                    self._run_backward(program.segments[index])
        return self._schedule

    def _is_read_in_backward(self, index: int) -> bool:
        """Return whether its group's backward, or what that runs again, reads the map."""
        if self._has_statistics(index) and self._needs.backward[self._producer[index]]:
            return True
        return any(
            self._needs.backward[reader] or self._is_made_again(self._program.segments[reader].out)
            for reader in self._program.consumers(index)
        )

    def _is_made_again(self, index: int | None) -> bool:
        return index is not None and index in self._inner and self._is_read_in_backward(index)

    def _has_statistics(self, index: int) -> bool:
        return any(norm.domain != "fixed" for norm in self._program.norms_of(index))

    def _new(self, name: str, n_bytes: int, is_content: bool) -> int:
        action = len(self._schedule.actions) - 1
        buffer = Buffer(name, n_bytes, action, action, is_content, [action])
        self._schedule.buffers.append(buffer)
        return len(self._schedule.buffers) - 1

    def _touch(self, buffers: dict[int, int], index: int) -> None:
        if index in buffers:
            self._schedule.buffers[buffers[index]].touch(len(self._schedule.actions) - 1)

    def _run_forward(self, kind: Kind, segment: Segment, content: dict[int, int]) -> None:
        program, schedule = self._program, self._schedule
        schedule.actions.append(Action(kind, segment.index))
        for mask in program.masks:
            if mask.segment == segment.index and kind == "forward":
                self._hold(mask.map, content)
        for index in (*segment.sources, *masks_of(segment.source)):
            self._touch(content if index in content else schedule.forward, index)
        if segment.out is not None and segment.out not in self._outside:
            self._hold(segment.out, content)

    def _hold(self, index: int, content: dict[int, int]) -> None:
        name = self._program.maps[index].name
        content[index] = self._new(name, self._program.maps[index].n_bytes, True)
        if content is self._schedule.forward and index not in self._inner:
            self._schedule.backward[index] = content[index]

    def _run_backward(self, segment: Segment) -> None:
        program, schedule, needs = self._program, self._schedule, self._needs
        schedule.actions.append(Action("backward", segment.index))
        for index in (*segment.sources, *masks_of(segment.source)):
            self._touch(schedule.backward, index)
        if segment.out is not None:
            self._touch(schedule.gradient, segment.out)
            if self._has_statistics(segment.out):
                self._touch(schedule.backward, segment.out)
        shared = self._shared_gradient(segment)
        for index in segment.sources:
            if not needs.of_map[index] or index in program.inputs:
                continue
            if index in schedule.gradient:
                self._touch(schedule.gradient, index)
            elif index in shared and segment.out is not None:
                schedule.gradient[index] = schedule.gradient[segment.out]
            else:
                a_map = program.maps[index]
                name = f"gradient of {a_map.name}"
                schedule.gradient[index] = self._new(name, a_map.n_bytes, False)

    def _shared_gradient(self, segment: Segment) -> set[int]:
        """Return the sources whose gradient may lie where the segment's output's lies.

        # Note: [Gradients that share a place]
        # Behind a sum every term gets the same gradient, and the sum's own is not read any more.
        # So all of them are one buffer, as long as nothing is added to one of them before the
        # others have been read for the last time.
        """
        source, out = segment.source, segment.out
        if segment.operation is not None or out not in self._schedule.gradient:
            return set()
        if not isinstance(source, Blend) or len(set(segment.sources)) != len(source.terms):
            return set()
        if self._is_still_shared(out, segment.index):
            return set()
        candidates = [
            term.map
            for term in source.terms
            if self._needs.of_map[term.map]
            and term.map not in self._program.inputs
            and term.map not in self._schedule.gradient
            and is_unscaled(self._program, term)
            and _alike(self._program.maps[term.map], self._program.maps[out])
        ]
        return set(candidates) if self._is_safe(segment, candidates) else set(candidates[:1])

    def _is_still_shared(self, index: int, segment: int) -> bool:
        """Return whether another map's gradient lies in the same buffer and is read later."""
        gradient = self._schedule.gradient
        return any(
            gradient[other] == gradient[index] and self._producer.get(other, -1) < segment
            for other in gradient
            if other != index
        )

    def _is_safe(self, segment: Segment, candidates: list[int]) -> bool:
        for index in candidates:
            for other in candidates:
                if other == index:
                    continue
                last_read = self._producer.get(other, -1)
                adding = [
                    reader
                    for reader in self._program.consumers(index)
                    if reader != segment.index and self._needs.backward[reader]
                ]
                if any(reader >= last_read for reader in adding):
                    return False
        return True


def _alike(one: Map, other: Map) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def is_unscaled(program: Program, term: Term) -> bool:
    """Return whether the gradient of a term is what the map's gradient buffer holds."""
    return term.norm == program.gradient_norms[term.map]


def step_flops(program: Program, schedule: Schedule) -> list[float]:
    """Return the operations of each action, for progress and for cost."""
    costs = []
    for action in schedule.actions:
        segment = program.segments[action.segment]
        operation = segment.operation
        inner = operation.inner if isinstance(operation, InPlanes) else operation
        twice = 2.0 if isinstance(inner, Convolution) else 1.0
        costs.append(segment.flops * (twice if action.kind == "backward" else 1.0))
    return costs
