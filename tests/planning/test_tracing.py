"""A traced step is what a real step does: saved bytes, lifetimes, operations."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from umtrain import models
from umtrain.errors import ConfigError
from umtrain.memory.checkpoint import recomputing
from umtrain.memory.options import Options
from umtrain.planning.tracing import mean_square, trace_step

CHANNELS = 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        return x + self.conv(x)


LAYERS = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "norm": lambda: nn.BatchNorm2d(CHANNELS),
    "norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)),
    "tanh": nn.Tanh,
    "pool": lambda: nn.MaxPool2d(2),
    "residual": Residual,
}
NETS = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6)


def build(names: list[str]) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, CHANNELS, 1), *(LAYERS[name]() for name in names)]
    return nn.Sequential(*layers)


def really_saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that autograd saves in a real step, the model's and the input's left out."""
    resting = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in resting:
            kept.append(tensor.untyped_storage())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = mean_square(model(x))
    del loss
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def really_live_bytes(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Return the peak of a real step, by the profiler's log of torch's allocator, and its end."""
    with torch.profiler.profile(profile_memory=True, with_stack=False) as profile:
        mean_square(model(x)).backward()
    events = profile.profiler.kineto_results.events()
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if is_memory(e)]
    levels = list(itertools.accumulate(changes))
    return max(levels), levels[-1]


def is_memory(event) -> bool:
    return event.name() == "[memory]"


@settings(max_examples=12)
@given(NETS, st.sampled_from([16, 32]))
def test_what_is_saved_is_what_autograd_saves(names, size):
    model, x = build(names), torch.randn(2, 3, size, size)
    trace = trace_step(model, x, precision="fp32")
    assert trace.saved_bytes == really_saved_bytes(model, x)


@settings(max_examples=8)
@given(NETS)
def test_the_peak_is_that_of_torchs_own_allocator(names):
    model, x = build(names), torch.randn(2, 3, 64, 64)
    trace = trace_step(model, x, precision="fp32")
    resting = sum(a.n_bytes for a in trace.allocations if a.kind not in OF_THE_STEP)
    peak = max(trace.live_bytes()) - resting
    real_peak, _ = really_live_bytes(model, x)
    # Kernels that take scratch from torch's allocator hold it beside what is traced.
    largest = max(a.n_bytes for a in trace.allocations)
    assert peak <= real_peak <= peak + largest


OF_THE_STEP = ("saved", "temporary", "gradient")


def test_all_that_is_left_after_a_step_are_gradients():
    model, x = build(["conv", "norm and relu"]), torch.randn(2, 3, 16, 16)
    trace = trace_step(model, x, precision="fp32")
    last = len(trace.operations) - 1
    left = [a for a in trace.allocations if a.last == last and a.kind in OF_THE_STEP]
    learned = sum(p.nbytes for p in model.parameters())
    assert {a.kind for a in left} == {"gradient"}
    assert sum(a.n_bytes for a in left) == learned
    assert [a.n_bytes for a in trace.allocations if a.kind == "state"] == [2 * learned]


def test_backward_belongs_to_the_layer_that_ran_forward():
    model = models.create("resnet50", in_channels=3, n_outputs=2)
    trace = trace_step(model, torch.empty(1, 3, 64, 64), precision="fp32")
    convolutions = [o for o in trace.operations if o.name.startswith("convolution")]
    forward = [o.layer for o in convolutions if o.phase == "forward"]
    backward = [o.layer for o in convolutions if o.phase == "backward"]
    assert len(forward) == 53
    assert sorted(forward) == sorted(backward)
    assert forward[:2] == ["conv1", "layer1.0.conv1"]


def test_a_convolution_is_counted_as_the_textbook_does():
    model = nn.Conv2d(3, 8, (3, 5), stride=2, bias=False)
    trace = trace_step(model, torch.empty(2, 3, 33, 35), precision="fp32")
    first = trace.operations[0]
    assert first.name == "convolution"
    assert first.flops == 2 * (2 * 16 * 16) * 8 * (3 * 3 * 5)
    assert first.read_bytes == 4 * (2 * 3 * 33 * 35 + 8 * 3 * 15)
    assert first.written_bytes == 4 * 2 * 8 * 16 * 16
    assert first.convolution.output == (2, 16, 16)
    assert (first.convolution.kernel, first.convolution.stride) == ((3, 5), (2, 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_storage_is_read_again_after_its_last_forward_reader(precision):
    trace = trace_step(
        build(["conv", "norm and relu", "pool"]), torch.empty(1, 3, 32, 32), precision=precision
    )
    saved = [a for a in trace.allocations if a.kind == "saved"]
    assert saved
    for allocation in saved:
        assert allocation.saves
        assert allocation.first <= allocation.saved_until < trace.n_forward
        assert all(i >= trace.n_forward for i in allocation.needed)
        assert allocation.last >= max(allocation.needed, default=0)


def test_autocast_computes_in_bf16():
    model = build(["conv", "norm and relu"])
    trace = trace_step(model, torch.empty(1, 3, 16, 16), precision="bf16")
    convolutions = [o for o in trace.operations if o.convolution is not None]
    assert {o.dtype for o in convolutions} == {"bf16"}


def test_checkpointing_saves_less_and_computes_more():
    model = models.create("resnet50", in_channels=3, n_outputs=2)
    x = torch.empty(1, 3, 128, 128)
    ordinary = trace_step(model, x, precision="fp32")
    around = recomputing(model, x, Options())
    again = trace_step(model, x, precision="fp32", around=around)
    assert max(again.live_bytes()) < max(ordinary.live_bytes())
    n_forward = [
        sum(o.name == "convolution" for o in trace.operations) for trace in (ordinary, again)
    ]
    assert n_forward[1] == 2 * n_forward[0] - 1  # the stem is outside of blocks
    names = [o.name for o in again.operations]
    n_dtypes, n_blocks = 2, 16  # statistics and counters of a block are copied before each run
    assert names.count("_foreach_copy_") == 2 * n_dtypes * n_blocks
    assert "empty_like" not in names
    assert "forward" not in vars(model.layer1[0])


def test_a_model_and_a_batch_without_memory_will_do():
    with torch.device("meta"):
        model = models.create("resunet35", in_channels=1, n_outputs=2)
        x = torch.empty(1, 1, 51200, 102400)
    assert max(trace_step(model, x, precision="fp32").live_bytes()) > 2**42


def test_a_model_that_needs_data_is_refused_by_name():
    class DataDependent(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ConfigError, match="DataDependent cannot be planned"):
        trace_step(DataDependent(), torch.ones(2, 2), precision="fp32")
