"""What every model promises: its shape, its gradients, and a graph of plain layers."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from umtrain import models
from umtrain.errors import ConfigError
from umtrain.models.resunet35 import NearestUpsample

NAMES = ("resnet18", "resnet50", "resnet101", "resunet35")
GRAPH_LAYERS = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Upsample,
    nn.Identity,
    nn.Linear,
)


class LayerTracer(torch.fx.Tracer):
    """Traces down to layers: modules without children, torch's or ours."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None


def create(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, **{"in_channels": 3, "n_outputs": 2, **options})


def test_unknown_model_lists_the_options() -> None:
    with pytest.raises(
        ConfigError, match=r"model=resnet5 is unknown.*resnet18, resnet50, resnet101, resnet18_3d"
    ):
        create("resnet5")


def test_unknown_norm_lists_the_options() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm=layer is unknown.*batch, frozen, group"):
        create("resnet50", norm="layer")


def test_unknown_pool_lists_the_options() -> None:
    with pytest.raises(ConfigError, match=r"model\.pool=min is unknown.*avg, max, avgmax"):
        create("resnet50", pool="min")


def test_pool_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="resunet35 has no global pooling"):
        create("resunet35", pool="max")


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("height_width", [(64, 64), (96, 160), (101, 67)])
def test_classifier_takes_any_size_and_gives_one_row_of_logits_per_image(
    in_channels: int, height_width: tuple[int, int]
) -> None:
    model = create("resnet50", in_channels=in_channels, n_outputs=3)
    assert model(torch.rand(2, in_channels, *height_width)).shape == (2, 3)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("height_width", [(128, 64), (192, 320)])
def test_resunet_gives_a_heatmap_per_keypoint_at_half_resolution(
    in_channels: int, height_width: tuple[int, int]
) -> None:
    model = create("resunet35", in_channels=in_channels, n_outputs=5)
    heatmaps = model(torch.rand(1, in_channels, *height_width))
    assert heatmaps.shape == (1, 5, height_width[0] // 2, height_width[1] // 2)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet18", "batch"),
        ("resnet50", "batch"),
        ("resnet50", "frozen"),
        ("resnet50", "group"),
        ("resnet101", "batch"),
        ("resunet35", "batch"),
        ("resunet35", "frozen"),
        ("resunet35", "group"),
    ],
)
def test_every_parameter_learns(name: str, norm: str) -> None:
    model = create(name, norm=norm)
    # Residual branches start at zero, so their insides have a gradient from the second step on.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        image = torch.rand(1, 3, 64, 128)
        model(image).square().sum().backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize(
    ("name", "norm"), [*((name, "batch") for name in NAMES), ("resunet35", "group")]
)
def test_graph_of_layers_computes_what_the_model_does(name: str, norm: str) -> None:
    model = create(name, norm=norm)
    graph = LayerTracer().trace(model)
    layers = dict(model.named_modules())
    traced = torch.fx.GraphModule(model, graph)
    called = [layers[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    assert all(isinstance(layer, GRAPH_LAYERS) for layer in called)
    image = torch.rand(1, 3, 64, 128)
    torch.testing.assert_close(traced(image), model(image), rtol=0, atol=0)


@pytest.fixture
def autocast_on_a_gpu() -> Iterator[None]:
    """Cast as torch does on a GPU, on tensors without data."""
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode():
        yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", dtype)


def test_upsampling_keeps_bf16_where_autocast_would_double_its_memory(
    autocast_on_a_gpu: None,
) -> None:
    x = torch.empty(1, 2, 4, 6, device="cuda", dtype=torch.bfloat16)
    assert nn.Upsample(scale_factor=2)(x).dtype == torch.float32
    enlarged = NearestUpsample()(x)
    assert (enlarged.dtype, enlarged.shape) == (torch.bfloat16, (1, 2, 8, 12))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_upsampling_is_torchs(device: str) -> None:
    x = torch.randn(2, 3, 5, 7, device=device)
    expected, enlarged = nn.Upsample(scale_factor=2)(x), NearestUpsample()(x)
    assert enlarged.shape == expected.shape
    assert device == "meta" or torch.equal(enlarged, expected)


@pytest.mark.parametrize("name", ["resnet50", "resunet35"])
def test_model_runs_in_bf16_autocast_and_channels_last(name: str) -> None:
    model = create(name).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(1, 3, 64, 128).to(memory_format=torch.channels_last))
    output.float().sum().backward()
    assert output.isfinite().all()


def test_resunet35_has_35_convolutions() -> None:
    assert sum(isinstance(m, nn.Conv2d) for m in create("resunet35").modules()) == 35


@pytest.mark.parametrize("height_width", [(100, 128), (128, 96)])
def test_resunet_names_the_size_it_cannot_halve(height_width: tuple[int, int]) -> None:
    height, width = height_width
    with pytest.raises(ConfigError, match=f"{height}×{width} pixels.*multiples of 64.*resize"):
        create("resunet35")(torch.rand(1, 3, height, width))


def test_max_pooling_keeps_a_lone_response_at_any_size_and_average_dilutes_it() -> None:
    feature_maps = torch.zeros(2, 1, 64, 64)
    feature_maps[1, 0, 10, 10] = 1.0
    pools = {pool: create("resnet50", pool=pool).avgpool for pool in ("max", "avg", "avgmax")}
    assert pools["max"](feature_maps)[1].item() == 1.0
    assert pools["avg"](feature_maps)[1].item() == pytest.approx(1 / 64**2)
    assert pools["avgmax"](feature_maps)[1].item() == pytest.approx((1 + 1 / 64**2) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_several_columns_of_images_wider_than_the_total_stride(name):
    stride = models.total_stride(name)
    step = stride if name == "resunet35" else 1
    with FakeTensorMode():
        model = create(name)
        assert _fewest_columns(model, stride) == 1
        assert _fewest_columns(model, stride + step) == 2


def _fewest_columns(model: nn.Module, n_columns: int) -> int:
    """Return the columns of the narrowest map that a convolution of `model` makes."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(output.shape[-1]))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    model(torch.empty(1, 3, 128, n_columns))
    for hook in hooks:
        hook.remove()
    return min(found)
