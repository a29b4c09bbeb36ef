"""Training and evaluation agree at batch size 1, except with stock running statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from umtrain import models
from umtrain.errors import ConfigError
from umtrain.models.norm import BatchNorm2d, FrozenBatchNorm2d, group_norm, set_eval_statistics


def images_of_varied_contrast(n_images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    contrast = torch.logspace(-0.7, 0.7, n_images)
    return [
        factor * torch.randn(1, 1, 64, 128, generator=generator) + factor for factor in contrast
    ]


def trained_at_batch_1(name: str, norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(name, in_channels=1, n_outputs=2, norm=norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for image in images_of_varied_contrast(5):
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def relative_difference_of_modes(model: nn.Module) -> float:
    """Return how far evaluation is from training, in standard deviations of the output."""
    image = images_of_varied_contrast(1)[0]
    in_training = model.train()(image)
    in_evaluation = model.eval()(image)
    return float((in_training - in_evaluation).abs().max() / in_training.std())


@pytest.mark.parametrize("name", ["resnet50", "resunet35"])
def test_running_statistics_evaluate_another_function_than_was_trained(name: str) -> None:
    assert relative_difference_of_modes(trained_at_batch_1(name, "batch")) > 0.5


@pytest.mark.parametrize("name", ["resnet50", "resunet35"])
def test_image_statistics_evaluate_what_was_trained_to_the_bit(name: str) -> None:
    model = trained_at_batch_1(name, "batch")
    set_eval_statistics(model, "image")
    assert relative_difference_of_modes(model) == 0


@pytest.mark.parametrize("norm", ["group", "frozen"])
@pytest.mark.parametrize("name", ["resnet50", "resunet35"])
def test_group_and_frozen_evaluate_what_was_trained_to_the_bit(name: str, norm: str) -> None:
    assert relative_difference_of_modes(trained_at_batch_1(name, norm)) == 0


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_image_statistics_do_not_depend_on_the_rest_of_the_batch(
    memory_format: torch.memory_format,
) -> None:
    layer = BatchNorm2d(8).eval()
    set_eval_statistics(layer, "image")
    batch = torch.randn(3, 8, 9, 7) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1)
    batch = batch.to(memory_format=memory_format)
    together = layer(batch)
    alone = torch.cat([layer(image) for image in batch.split(1)])
    assert torch.equal(together, alone)
    assert together.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(together, nn.InstanceNorm2d(8)(batch))


def test_training_is_that_of_torch_and_so_is_the_state_dict() -> None:
    ours, stock = BatchNorm2d(4), nn.BatchNorm2d(4)
    batch = torch.randn(2, 4, 5, 5)
    assert torch.equal(ours(batch), stock(batch))
    state = ours.state_dict()
    stock.load_state_dict(state)
    assert torch.equal(state["running_var"], stock.running_var)
    assert state["num_batches_tracked"] == 1


def test_running_statistics_are_the_stock_evaluation() -> None:
    ours = BatchNorm2d(4)
    ours(torch.randn(2, 4, 5, 5) * 3 + 1)
    stock = nn.BatchNorm2d(4)
    stock.load_state_dict(ours.state_dict())
    image = torch.randn(1, 4, 5, 5)
    set_eval_statistics(ours, "image")
    set_eval_statistics(ours, "running")
    assert torch.equal(ours.eval()(image), stock.eval()(image))


def test_frozen_keeps_its_statistics_and_trains_its_scale() -> None:
    layer = FrozenBatchNorm2d(4)
    layer.running_mean.fill_(2.0)
    model = nn.Sequential(layer).train()
    model(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert torch.equal(layer.running_mean, torch.full((4,), 2.0))
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


@settings(deadline=None)
@given(st.integers(1, 64).map(lambda n: 32 * n))
def test_groups_are_32_or_have_two_channels(n_channels: int) -> None:
    layer = group_norm(n_channels)
    assert layer.num_groups == (32 if n_channels >= 64 else n_channels // 2)


def test_unknown_statistics_list_the_options() -> None:
    with pytest.raises(ConfigError, match="'batch' are unknown; choose one of running, image"):
        set_eval_statistics(BatchNorm2d(2), "batch")
