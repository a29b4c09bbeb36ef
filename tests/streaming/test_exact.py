"""Loss, gradients and running statistics are those of autograd: the engine's whole point."""

import pytest
import torch
import torchvision
from torch import nn

from umtrain import models
from umtrain.models.heatmap import KeypointLoss
from umtrain.streaming.module import Streamer
from umtrain.streaming.running import Settings

NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), (2, 3, 65, 97)),
    "resnet34": (lambda: torchvision.models.resnet34(num_classes=3), (1, 3, 97, 65)),
    "resnet50": (lambda: models.create("resnet50", in_channels=3, n_outputs=2), (1, 3, 97, 81)),
    "resnet101": (lambda: models.create("resnet101", in_channels=3, n_outputs=2), (1, 3, 65, 65)),
    "resunet35": (lambda: models.create("resunet35", in_channels=1, n_outputs=2), (2, 1, 128, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exact_when_all_is_kept(compare, name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    compare(build(), torch.randn(shape)).assert_equal()


@pytest.mark.parametrize("name", ["resnet50", "resunet35"])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_networks_are_exact_when_maps_go_out_and_are_made_again(compare, host, name, share):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    budget_bytes = int(share * 10e6)
    both = compare(build(), torch.randn(shape), budget_bytes=budget_bytes, host=host)
    assert host.written_bytes > 0
    both.assert_equal()


def test_a_loss_over_heatmaps_is_exact(compare):
    build, shape = NETWORKS["resunet35"]
    torch.manual_seed(0)
    keypoints = torch.tensor([[[20.0, 30.0], [40.0, 90.0]]] * shape[0])
    criterion = KeypointLoss(stride=2)
    both = compare(build(), torch.randn(shape), loss=lambda maps: criterion(maps, keypoints))
    both.assert_equal(1e-5)  # the loss itself computes in float32


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 10**9])
def test_the_height_of_strips_changes_nothing(compare, strip_bytes):
    build, shape = NETWORKS["resnet18"]
    torch.manual_seed(0)
    compare(build(), torch.randn(shape), strip_bytes=strip_bytes).assert_equal()


def test_gradients_add_up_over_steps_and_so_do_running_statistics(compare):
    build, shape = NETWORKS["resnet18"]
    torch.manual_seed(0)
    compare(build(), torch.randn(shape), steps=3).assert_equal()


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_other_normalisations_are_exact(compare, norm):
    torch.manual_seed(0)
    model = models.create("resnet50", in_channels=3, n_outputs=2, norm=norm)
    compare(model, torch.randn(2, 3, 65, 65)).assert_equal()


def test_evaluation_uses_running_statistics_or_the_image_s_own(compare):
    for statistics in ("running", "image"):
        torch.manual_seed(0)
        model = models.create("resnet50", in_channels=3, n_outputs=2).eval()
        models.norm.set_eval_statistics(model, statistics)
        compare(model, torch.randn(2, 3, 65, 65)).assert_equal()


def test_dropout_draws_what_autograd_draws(compare):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Conv2d(8, 4, 3, padding=1),
    )
    compare(model, torch.randn(2, 3, 17, 13)).assert_equal()


def test_frozen_parameters_get_no_gradient_and_cost_no_backward(compare):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer3", "layer4", "fc")))
    compare(model, torch.randn(1, 3, 65, 65)).assert_equal()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_reduced_precision_is_as_close_to_float64_as_vanilla_is(errors_against_float64, precision):
    plain, streamed = errors_against_float64(precision)
    assert 0 < streamed <= 1.1 * plain


def test_instance_norm_is_exact_where_torch_is():
    """The reference is not channels-last: there torch 2.15 gets this input gradient wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1)).double()
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    weights = torch.rand(2, 4, 7, 5, dtype=torch.float64)
    found = []
    for forward in (model, Streamer(model, Settings(strip_bytes=1))):
        given = x.clone().requires_grad_()
        (forward(given) * weights).square().sum().backward()
        found.append(given.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-12)
