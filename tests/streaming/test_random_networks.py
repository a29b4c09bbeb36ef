"""Small networks drawn at random are exact, whatever their layers, sizes, strips and budgets."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

CHANNELS = (4, 6, 8)


@st.composite
def convolutions(draw, channels: int):
    groups = draw(st.sampled_from([1, 2]))
    kernel = draw(st.sampled_from([1, 2, 3, (3, 1), 5]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    padding = draw(st.integers(0, 2))
    width = draw(st.sampled_from(CHANNELS))
    bias = draw(st.booleans())
    made = nn.Conv2d(channels, width, kernel, stride, padding, dilation, groups, bias)
    return made, width


@st.composite
def norms(draw, channels: int):
    kind = draw(st.sampled_from(["batch", "plain batch", "frozen", "group"]))
    if kind == "group":
        return nn.GroupNorm(2, channels)
    norm = nn.BatchNorm2d(channels, affine=kind != "plain batch")
    return norm.eval() if kind == "frozen" else norm


POINTWISE = (nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Sigmoid)


@st.composite
def poolings(draw):
    return draw(
        st.sampled_from(
            [
                nn.MaxPool2d(3, 2, 1),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.MaxPool2d(3, 1, 1, dilation=1),
                nn.AvgPool2d(2),
                nn.AvgPool2d(3, 2, 1),
                nn.Upsample(scale_factor=2),
                nn.Upsample(scale_factor=3, mode="nearest"),
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Dropout(0.3),
            ]
        )
    )


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.branch, self.after = branch, after

    def forward(self, x):
        return self.after(self.branch(x) + x)


class Dense(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return torch.cat([x, self.branch(x)], dim=1)


@st.composite
def stages(draw, channels: int):
    """Return a few layers that belong together, and how many channels come out."""
    kind = draw(st.sampled_from(["convolution", "pointwise", "pooling", "residual", "dense"]))
    if kind == "convolution":
        convolution, width = draw(convolutions(channels))
        return nn.Sequential(convolution, draw(norms(width))), width
    if kind == "pointwise":
        return draw(st.sampled_from(POINTWISE))(), channels
    if kind == "pooling":
        return draw(poolings()), channels
    branch = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=draw(st.booleans())),
        draw(norms(channels)),
        draw(st.sampled_from(POINTWISE))(),
    )
    if kind == "residual":
        return Residual(branch, draw(st.sampled_from(POINTWISE))()), channels
    return Dense(branch), 2 * channels


@st.composite
def networks(draw):
    width = draw(st.sampled_from(CHANNELS))
    layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1)]
    for _ in range(draw(st.integers(1, 5))):
        made, width = draw(stages(width))
        layers.append(made)
    head = draw(st.sampled_from([nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)]))
    return nn.Sequential(*layers, head)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    networks(),
    st.integers(1, 3),
    st.integers(5, 23),
    st.integers(5, 23),
    st.sampled_from([1, 2000, 10**8]),
    st.sampled_from([None, 0, 20_000]),
    st.integers(0, 10**6),
)
def test_any_network_is_exact(
    compare, host, model, n_images, rows, columns, strip_bytes, budget_bytes, seed
):
    torch.manual_seed(seed)
    x = torch.randn(n_images, 2, rows, columns)
    assume(_runs(model, x))
    both = compare(model, x, strip_bytes=strip_bytes, budget_bytes=budget_bytes, host=host)
    both.assert_equal(1e-9)  # a norm over a handful of pixels multiplies rounding errors


def _runs(model: nn.Module, x: torch.Tensor) -> bool:
    """Return whether the network accepts the image at all, with a variance to divide by."""
    try:
        with torch.no_grad():
            for layer in model:
                x = layer(x)
                if min(x.shape[2:]) == 0 or x.abs().max() > 1e6:
                    return False
    except (RuntimeError, ValueError):
        return False
    return x.numel() < 200_000 and bool(x.isfinite().all())
