"""Seconds of a streamed step: its convolutions, and the passes over maps beside them.

A strip stays in the cache from one operation to the next, and what is done pixel by pixel is done
in one pass. So a segment costs its convolution, and reading and writing maps as often as the
tables below say.
"""

import math

from torch import Tensor

from umtrain.planning.profile import Profile
from umtrain.planning.seconds import operation_seconds
from umtrain.planning.step import Convolution, Operation, Phase, StepTrace
from umtrain.streaming import operations
from umtrain.streaming.module import STRIP_BYTES
from umtrain.streaming.plan import Plan
from umtrain.streaming.program import Program, Segment
from umtrain.streaming.schedule import Action
from umtrain.streaming.volumes import InPlanes

_DTYPES = {2: "bf16", 4: "fp32", 8: "fp64"}
# Passes over each source and output map in an action, counted in umtrain/streaming/forward.py and
# backward.py: an expression reads its sources and writes a strip; moments read a result and copy
# it. In backward the strip is made again, the output's gradient is finished from what is stored
# and the map, and what comes out is added to the gradients of the sources.
# On a GPU a step's actions are one graph, whose kernels are launched by the GPU itself. What an
# action's many small ones cost beside its large ones: ResNet-50 at 512 x 512, where nearly all are
# small, took 80 µs an action on an H100 (scripts/results/gpu_check.json), 55 on an H200.
_ACTION_S = 50e-6
# A strip's rooms, cursors and calls, beside its kernels, where no graph was recorded: what is left
# of steps of ResNet-50, ResNet-101 and ResUNet35 at 256 to 2048 pixels, 8 to 18 on 16 cores of a
# Xeon in bf16, and about as many on two cores of an EPYC in fp32, where they scatter more.
_LAUNCHES_PER_STRIP = 13
_FORWARD_PASSES = {"source": 2.0, "output": 2.0}
_BACKWARD_PASSES = {"source": 5.0, "output": 3.0}


def beside_streaming_seconds(step: StepTrace, profile: Profile) -> float:
    """Return the seconds of what a streamed step does as an ordinary one, `step`, does it.

    Weights are cast once, and updated.
    """
    return sum(
        operation_seconds(each, profile)
        for each in step.operations
        if each.phase == "optimizer" or each.name == "_to_copy"
    )


def streaming_seconds(program: Program, plan: Plan, profile: Profile) -> list[float]:
    """Return the seconds of each action of a streamed step, what moves to host memory left out."""
    return [_action_s(program, action, profile) for action in plan.schedule.actions]


def _action_s(program: Program, action: Action, profile: Profile) -> float:
    segment = program.segments[action.segment]
    backward = action.kind == "backward"
    passes = _BACKWARD_PASSES if backward else _FORWARD_PASSES
    source_bytes = math.prod(segment.source_shape) * segment.source_dtype.itemsize
    output_bytes = 0 if segment.out is None else program.maps[segment.out].n_bytes
    moved = passes["source"] * source_bytes + passes["output"] * output_bytes
    half = int(moved / 2)
    traffic = Operation("add", segment.name, "forward", _dtype(segment), 0.0, half, half)
    seconds = operation_seconds(traffic, profile)
    phase: Phase = "backward" if backward else "forward"
    convolution = convolution_of(program, segment, phase)
    if convolution is not None:
        seconds += operation_seconds(convolution, profile)
    if profile.kind == "cuda":
        return _ACTION_S + seconds
    n_strips = math.ceil(max(source_bytes, output_bytes) / STRIP_BYTES["cpu"])
    return seconds + n_strips * _LAUNCHES_PER_STRIP * profile.launch_s


def _dtype(segment: Segment) -> str:
    return _DTYPES.get(segment.source_dtype.itemsize, "fp32")


def convolution_of(program: Program, segment: Segment, phase: Phase) -> Operation | None:
    """Return a segment's convolution, if it has one; a volume's as it is before folding."""
    operation = segment.operation
    inner = operation.inner if isinstance(operation, InPlanes) else operation
    if not isinstance(inner, operations.Convolution) or segment.out is None:
        return None
    a_map = program.maps[segment.out]
    n_images, out_channels, *sides = a_map.shape
    if isinstance(operation, InPlanes):
        sides = [sides[0], *operation.out_plane]
    weight = getattr(segment.module, "weight", None)
    kernel = tuple(weight.shape[2:]) if isinstance(weight, Tensor) else (1, 1)
    in_channels = segment.source_shape[1]
    shape = Convolution(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=kernel,
        stride=inner.stride,
        groups=inner.groups,
        output=(n_images, *sides),
    )
    source_bytes = math.prod(segment.source_shape) * segment.source_dtype.itemsize
    twice = 2.0 if phase == "backward" and segment.sources != program.inputs else 1.0
    return Operation(
        name="convolution" if phase == "forward" else "convolution_backward",
        layer=segment.name,
        phase=phase,
        dtype=_dtype(segment),
        flops=twice * segment.flops,
        read_bytes=source_bytes,
        written_bytes=a_map.n_bytes,
        convolution=shape,
    )
