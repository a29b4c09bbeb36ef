"""What 3D networks promise."""

import pytest
import torch
from torch import nn

from umtrain import models
from umtrain.errors import ConfigError
from umtrain.models.norm import BatchNorm3d, set_eval_statistics
from umtrain.models.resnet import split_classifier
from umtrain.models.resnet3d import FEATURE_STRIDE_VOXELS


def create(name="resnet18_3d", **options):
    torch.manual_seed(0)
    return models.create(name, **{"in_channels": 1, "n_outputs": 1, **options})


@pytest.mark.parametrize("shape", [(17, 33, 40), (24, 64, 64), (32, 45, 70)])
def test_any_size_gives_one_row_of_logits_per_volume(shape):
    assert create(n_outputs=3)(torch.rand(2, 1, *shape)).shape == (2, 3)


def test_resnet101_3d_has_101_layers_with_weights():
    model = create("resnet101_3d")
    learned = [m for n, m in model.named_modules() if isinstance(m, nn.Conv3d | nn.Linear)]
    shortcuts = [n for n, _ in model.named_modules() if n.endswith("downsample.0")]
    assert len(learned) - len(shortcuts) == 101


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_norms_are_those_that_were_asked_for(norm):
    kinds = {type(m) for m in create(norm=norm).modules() if "Norm" in type(m).__name__}
    assert kinds == {type(models.norm.norm_layer(norm, 3)(4))}


def test_every_parameter_learns():
    model = create()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):  # residual branches start at zero
        optimizer.zero_grad()
        model(torch.rand(2, 1, 18, 32, 40)).square().sum().backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_volume_is_evaluated_alone_with_its_own_statistics():
    model = create().eval()
    set_eval_statistics(model, "image")
    volumes = torch.rand(2, 1, 18, 32, 40)
    with torch.no_grad():
        together, alone = model(volumes), model(volumes[1:])
    torch.testing.assert_close(together[1:], alone)
    assert any(isinstance(m, BatchNorm3d) for m in model.modules())


def test_the_network_splits_before_its_pooling():
    model = create().eval()
    backbone, head = split_classifier(model)
    volume = torch.rand(1, 1, 32, 64, 96)
    features = backbone(volume)
    sizes = [n // stride for n, stride in zip(volume.shape[2:], FEATURE_STRIDE_VOXELS, strict=True)]
    assert list(features.shape[2:]) == sizes
    torch.testing.assert_close(head(features), model(volume))


def test_weights_of_rgb_films_are_summed_for_one_channel(tmp_path):
    film = create(in_channels=3)
    torch.save(film.state_dict(), tmp_path / "w.pt")
    grey = create(pretrained=tmp_path / "w.pt")
    torch.testing.assert_close(grey.conv1.weight, film.conv1.weight.sum(1, keepdim=True))


def test_an_unknown_pool_lists_the_options():
    with pytest.raises(ConfigError, match=r"model\.pool=min is unknown; choose one of avg, max"):
        create(pool="min")
