"""Seconds of a streamed step, from the engine's own plan of it."""

import pytest
import torch

import umtrain.planning.streaming_seconds as streaming_seconds_module
from umtrain import models
from umtrain.memory.options import Options
from umtrain.planning.predict import predict
from umtrain.planning.profile import load_profile
from umtrain.planning.seconds import operation_seconds
from umtrain.planning.streaming_seconds import streaming_seconds
from umtrain.planning.subject import Subject
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings

PROFILE = load_profile("a100_80gb")


def compiled_for(size_px, budget_bytes):
    model = models.create("resnet50", in_channels=3, n_outputs=1)
    model = model.to(memory_format=torch.channels_last)
    image = torch.empty((1, 3, size_px, size_px), memory_format=torch.channels_last)
    streamer = Streamer(model, Settings(lambda: budget_bytes, None, 2**20))
    (compiled,) = streamer.compile(image)
    return compiled


def seconds_of(compiled):
    return streaming_seconds(compiled.program, compiled.plan, PROFILE)


@pytest.fixture(scope="module")
def kept():
    return compiled_for(2048, None)


def test_each_action_has_its_seconds(kept):
    seconds = seconds_of(kept)
    assert len(seconds) == len(kept.plan.schedule.actions)
    assert all(each > 0 for each in seconds)


def test_an_action_of_a_gpu_costs_something_beside_its_kernels(kept, monkeypatch):
    seconds = seconds_of(kept)
    beside_s = streaming_seconds_module._ACTION_S
    monkeypatch.setattr(streaming_seconds_module, "_ACTION_S", 0.0)
    kernels_s = seconds_of(kept)
    assert min(kernels_s) > 0
    assert seconds == pytest.approx([each + beside_s for each in kernels_s])


def test_backward_takes_longer_than_forward(kept):
    seconds = seconds_of(kept)
    of = {"forward": 0.0, "backward": 0.0}
    for action, each in zip(kept.plan.schedule.actions, seconds, strict=True):
        of[action.kind] += each
    assert of["backward"] > of["forward"]


def test_four_times_the_pixels_take_about_four_times_as_long(kept):
    larger = sum(seconds_of(compiled_for(4096, None)))
    assert larger == pytest.approx(4 * sum(seconds_of(kept)), rel=0.1)


def test_maps_that_are_made_again_cost_time(kept):
    tight = compiled_for(2048, int(0.7 * kept.plan.arena_bytes))
    assert tight.plan.n_made_again > 0
    assert sum(seconds_of(tight)) > sum(seconds_of(kept))


def test_convolutions_of_volumes_cost_what_they_do_in_an_ordinary_step():
    model = torch.nn.Sequential(
        torch.nn.Conv3d(16, 32, 3, padding=1, bias=False), torch.nn.BatchNorm3d(32)
    ).to(memory_format=torch.channels_last_3d)
    volume = torch.empty((1, 16, 32, 96, 96), device="cpu")
    subject = Subject(model, volume, "fp32")
    ordinary, streamed = (
        predict(subject, name, PROFILE, Options(device="cuda")) for name in ("vanilla", "stream")
    )
    convolutions = [each for each in subject.trace().operations if each.convolution is not None]
    least_s = sum(operation_seconds(each, PROFILE) for each in convolutions)
    assert least_s < streamed.compute_s < 2 * ordinary.compute_s
