"""The engine as a piece of any loop: what it honours, and what it refuses by name."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from umtrain.errors import ConfigError
from umtrain.models.resunet35 import NearestUpsample
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).double()


def image(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, 20, 24, generator=generator, dtype=torch.float64)


def streamed(model: nn.Module, **settings) -> Streamer:
    return Streamer(model, Settings(strip_bytes=2000, **settings))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_several_forwards_before_one_backward_keep_their_maps_apart(model):
    other = copy.deepcopy(model)
    stream = streamed(other)
    for forward in (model, stream):
        (forward(image(1)).sum() + 2 * forward(image(2)).sum()).backward()
    assert_close(gradients(other), gradients(model))


def test_backwards_may_come_in_another_order_than_forwards(model):
    other = copy.deepcopy(model)
    stream = streamed(other)
    for forward in (model, stream):
        first, second = forward(image(1)).square().sum(), forward(image(2)).square().sum()
        first.backward()
        second.backward()
    assert_close(gradients(other), gradients(model))


def test_a_second_backward_through_the_same_forward_is_refused(model):
    loss = streamed(model)(image()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


def test_double_backward_is_refused(model):
    x = image().requires_grad_()
    loss = streamed(model)(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_hooks_on_the_output_run_and_change_gradients(model):
    other = copy.deepcopy(model)
    stream = streamed(other)
    for forward in (model, stream):
        output = forward(image())
        output.register_hook(lambda gradient: 3 * gradient)
        output.square().sum().backward()
    assert_close(gradients(other), gradients(model))


def test_hooks_on_layers_are_refused_by_name(model):
    model[2].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ConfigError, match="layer '2' has hooks"):
        streamed(model)(image())


def test_without_gradients_no_map_is_kept_for_backward(model):
    stream = streamed(model)
    with torch.no_grad():
        output = stream(image())
    assert not output.requires_grad
    torch.testing.assert_close(output, model(image()).detach(), rtol=1e-11, atol=1e-13)


def test_modes_may_change_between_steps(model):
    other = copy.deepcopy(model)
    stream = streamed(other)
    for network, forward in ((model, model), (other, stream)):
        forward(image(1)).sum().backward()
        network.eval()
        forward(image(2)).sum().backward()
        network.train()
    assert_close(gradients(other), gradients(model))
    assert_close(list(other.buffers()), list(model.buffers()))


class WithSoftmax(nn.Module):
    """Attention over the whole map between two convolutions: nothing a strip can know."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3, padding=1)
        self.after = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.before(x)
        weights = torch.softmax(x.flatten(2), dim=2).view_as(x)
        return self.after(torch.relu(x * weights))


def test_what_cannot_be_streamed_is_named_and_the_rest_streams_around_it(caplog):
    torch.manual_seed(0)
    model = WithSoftmax().double()
    other = copy.deepcopy(model)
    stream = streamed(other)
    with caplog.at_level("INFO", "umtrain"):
        for forward in (model, stream):
            forward(image()).square().sum().backward()
    assert_close(gradients(other), gradients(model))
    assert "softmax" in caplog.text
    assert "before" not in caplog.text


class Inverted(nn.Upsample):
    """An enlargement of its own, whatever it is derived from."""

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(("layer", "is_streamed"), [(Inverted, False), (NearestUpsample, True)])
def test_an_enlargement_streams_if_it_is_torchs_or_says_that_it_is(caplog, layer, is_streamed):
    enlarge = layer(scale_factor=2) if layer is Inverted else layer()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), enlarge, nn.Conv2d(4, 4, 3, padding=1)).double()
    other = copy.deepcopy(model)
    with caplog.at_level("INFO", "umtrain"):
        for forward in (model, streamed(other)):
            forward(image()).square().sum().backward()
    assert_close(gradients(other), gradients(model))
    assert ("run whole" not in caplog.text) == is_streamed


def test_a_network_with_nothing_to_stream_is_refused(model):
    with pytest.raises(ConfigError, match="nothing to stream"):
        Streamer(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), Settings())(torch.randn(1, 3))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_followed_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="control flow"):
        Streamer(Branching(), Settings())(torch.randn(1, 3, 8, 8))


def test_progress_runs_from_nothing_to_all(model):
    shares = []
    streamed(model, on_progress=shares.append)(image()).sum().backward()
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_an_interrupt_in_a_step_leaves_the_model_usable(model):
    other = copy.deepcopy(model)

    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    settings = Settings(strip_bytes=2000, on_progress=interrupt)
    stream = Streamer(other, settings)
    with pytest.raises(KeyboardInterrupt):
        stream(image()).sum().backward()
    settings.on_progress = lambda share: None
    other.zero_grad()
    other.load_state_dict(model.state_dict())
    stream(image()).sum().backward()
    model(image()).sum().backward()
    assert_close(gradients(other), gradients(model))


def test_the_plan_is_known_before_a_step():
    model = torchvision.models.resnet18()
    settings = Settings()
    (plan,) = Streamer(model, settings).plan(torch.empty(1, 3, 64, 64))
    assert plan.arena_bytes > 0
    assert plan.host_bytes == 0
    assert "feature maps" in plan.summary()


def test_evaluation_has_the_room_that_training_is_done_with():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    left_bytes = iter([2**22, 0])  # the arena has what training found free
    streamer = Streamer(model, Settings(lambda: next(left_bytes), None, 4096))
    x = torch.randn(1, 2, 20, 20)
    streamer(x).sum().backward()
    model.eval()
    with torch.no_grad():
        assert torch.allclose(streamer(x), model(x), atol=1e-5)
