"""Grad-CAM against its definition, by autograd through whole networks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from umtrain import models
from umtrain.evaluation.gradcam import grad_cam
from umtrain.models.resnet import AverageAndMax, split_classifier

POOLS = {
    "avg": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.AdaptiveMaxPool2d(1),
    "avgmax": AverageAndMax,
}


def make_head(pool="avg", channels=6):
    return nn.Sequential(POOLS[pool](), nn.Flatten(), nn.Linear(channels, 1)).double()


def make_features(shape=(2, 6, 4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pooled_linear_layer_weighs_its_channels_by_its_own_weights(pool):
    head, features = make_head(pool), make_features()
    weighted = torch.einsum("nchw,c->nhw", features, head[2].weight[0] / 20).relu()
    torch.testing.assert_close(grad_cam(features, head), weighted)


def test_it_is_what_hooks_on_the_whole_network_give():
    torch.manual_seed(0)
    model = models.create("resnet50", in_channels=3, n_outputs=1).eval()
    backbone, head = split_classifier(model)
    x = torch.randn(2, 3, 96, 64)
    kept = {}
    model.layer4.register_forward_hook(lambda module, inputs, output: kept.update(map=output))
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.sum(), kept["map"])
    expected = (gradient.mean((2, 3), keepdim=True) * kept["map"]).sum(1).relu().detach()
    with torch.no_grad():
        features = backbone(x)
        assert torch.equal(head(features), logits)
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(features, head), expected)


def test_a_head_that_is_not_linear_is_differentiated_where_each_image_is():
    head = nn.Sequential(make_head(), nn.Tanh())
    features = 2 * make_features()
    together = grad_cam(features, head)
    apart = torch.cat([grad_cam(image[None], head) for image in features])
    torch.testing.assert_close(together, apart)
    slopes = 1 - head(features).square().detach()
    torch.testing.assert_close(together, slopes[..., None] * grad_cam(features, head[0]))


@given(st.permutations(range(12)), st.sampled_from(sorted(POOLS)))
def test_positions_keep_their_values_wherever_they_are(order, pool):
    head, features = make_head(pool), make_features((1, 6, 3, 4))
    moved = features.flatten(2)[:, :, order].view_as(features)
    expected = grad_cam(features, head).flatten(1)[:, order].view(1, 3, 4)
    torch.testing.assert_close(grad_cam(moved, head), expected)


def test_what_speaks_against_the_class_is_0():
    head = make_head()
    nn.init.constant_(head[2].weight, -1.0)
    assert grad_cam(make_features().abs(), head).count_nonzero() == 0


def test_it_works_where_gradients_are_off_and_leaves_none_behind():
    head, features = make_head(), make_features()
    before = features.clone()
    with torch.no_grad():
        values = grad_cam(features, head)
    assert not values.requires_grad
    assert torch.equal(features, before)
    assert not features.requires_grad
    assert all(parameter.grad is None for parameter in head.parameters())


def test_half_precision_is_summed_in_full():
    head = make_head(channels=2048).float()
    features = make_features((1, 2048, 3, 3)).abs().float()
    full = grad_cam(features, head)
    with torch.autocast("cpu", torch.bfloat16):
        half = grad_cam(features.bfloat16(), head)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.02 * full.max().item())


def test_a_head_of_several_logits_is_refused():
    with pytest.raises(ValueError, match=r"must return \(2, 1\) logits; got \(2, 3\)"):
        grad_cam(make_features(), lambda features: features.mean((2, 3))[:, :3])
