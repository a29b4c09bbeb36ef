"""Volumes under the engine, slices as rows: exact as images are."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from umtrain import models
from umtrain.errors import ConfigError
from umtrain.streaming import running
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings
from umtrain.streaming.volumes import folded, plane_of, unfolded


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, stride=(1, 2, 2), padding=1, bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(3, stride=2, padding=1),
        nn.Conv3d(6, 8, (3, 1, 5), padding=(1, 0, 2), groups=2),
        nn.InstanceNorm3d(8, affine=True),
        nn.GELU(),
        nn.AvgPool3d(2),
        nn.Conv3d(8, 4, 3, padding=2, dilation=2),
        nn.GroupNorm(2, 4),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


@pytest.mark.parametrize("strip_bytes", [1, 10_000, 10**9])
def test_every_layer_of_volumes_is_exact_at_any_height_of_strips(compare, strip_bytes):
    torch.manual_seed(0)
    volumes = torch.randn(2, 1, 19, 23, 30)
    compare(small_network(), volumes, strip_bytes=strip_bytes).assert_equal()


@pytest.mark.parametrize(
    ("name", "norm"),
    [("resnet18_3d", "batch"), ("resnet18_3d", "group"), ("resnet101_3d", "batch")],
)
def test_networks_are_exact(compare, name, norm):
    torch.manual_seed(0)
    model = models.create(name, in_channels=1, n_outputs=2, norm=norm)
    compare(model, torch.randn(1, 1, 17, 33, 40), strip_bytes=20_000).assert_equal()


def test_a_network_is_exact_when_maps_go_out_and_are_made_again(compare, host):
    torch.manual_seed(0)
    model = models.create("resnet18_3d", in_channels=1, n_outputs=2)
    volume = torch.randn(1, 1, 20, 48, 48)
    both = compare(model, volume, budget_bytes=2_000_000, host=host)
    assert host.written_bytes > 0
    both.assert_equal()


def test_a_map_that_comes_out_of_the_engine_has_the_shape_of_a_volume():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU()).double()
    x = torch.randn(2, 2, 5, 6, 7, dtype=torch.float64)
    streamed = Streamer(model, Settings(strip_bytes=1))(x)
    torch.testing.assert_close(streamed, model(x), rtol=1e-11, atol=1e-12)


def test_enlarging_a_volume_is_refused_by_name():
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Upsample(scale_factor=2))
    with pytest.raises(ConfigError, match="enlarges a volume, which is not streamed"):
        Streamer(model, Settings())(torch.zeros(1, 1, 4, 4, 4))


def test_slices_as_rows_are_the_same_bytes():
    volume = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    rows = folded(volume)
    assert rows.shape == (2, 3, 4, 30)
    assert rows.is_contiguous(memory_format=torch.channels_last)
    assert rows.data_ptr() == volume.data_ptr()
    assert torch.equal(unfolded(rows, plane_of(volume)), volume)


class _Graph:
    """A CUDA graph that was recorded, and does nothing when it is replayed."""

    def pool(self):
        return None

    def replay(self):
        pass


def test_a_recorded_step_takes_the_gradients_of_pooled_volumes_as_autograd_gives_them(monkeypatch):
    # Recording needs CUDA; what it copies where does not.
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(running, "_capturing", lambda *_: nullcontext())
    monkeypatch.setattr(running, "can_be_recorded", lambda ready: True)
    torch.manual_seed(0)
    model = models.create("resnet18_3d", in_channels=1, n_outputs=2)
    streamer = Streamer(model, Settings())
    volumes = torch.randn(2, 1, 17, 33, 40)
    recorded = []
    take = running.RecordedStep.backward

    def backward(step, given):
        found = take(step, given)
        recorded.append(len(given))
        for kept, new in zip(step._recording.given, given, strict=True):
            assert torch.equal(kept, new)
        return found

    monkeypatch.setattr(running.RecordedStep, "backward", backward)
    for _ in range(3):
        streamer(volumes).sum().backward()
    assert recorded == [2, 2]  # what averages and what maxima are given, from the second step on
