"""The C kernels do what PyTorch's operations do; rounding apart."""

import itertools

import pytest
import torch

from umtrain.streaming.kernels import Affine, arithmetic_dtype
from umtrain.streaming.kernels.native import NativeKernels, native_kernels
from umtrain.streaming.kernels.torch_ops import TorchKernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)
CHANNELS = (1, 3, 40, 64)  # less than a tile, a tile and more, whole tiles


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    kernels = native_kernels()
    assert kernels is not None, "the tests need a C compiler"
    return kernels


def strip(channels: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(1, channels, 7, 61).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def terms_for(kind: tuple[str, ...], channels: int, dtype: torch.dtype):
    wide = arithmetic_dtype(dtype)

    def coefficient() -> torch.Tensor:
        return torch.randn(channels, dtype=wide)

    terms = [
        Affine(strip(channels, dtype), *((coefficient(), coefficient()) if k == "scaled" else ()))
        for k in kind
    ]
    return terms, [coefficient() if k == "scaled" else None for k in kind]


KINDS = [("plain",), ("scaled",), *itertools.product(("plain", "scaled"), repeat=2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [False, True])
def test_blends_and_their_gradients_agree(native, dtype, channels, kind, relu):
    terms, means = terms_for(kind, channels, dtype)
    tolerance = TOLERANCE[dtype]
    made = [strip(channels, dtype) for _ in range(2)]
    dz, before = strip(channels, dtype), strip(channels, dtype)
    for kernels, out in zip((native, TorchKernels()), made, strict=True):
        kernels.blend(terms, relu, out)
    torch.testing.assert_close(*made, atol=tolerance, rtol=tolerance)
    for add in (False, True):
        g = [before.clone(memory_format=torch.channels_last) for _ in range(2)]
        sums = [
            kernels.blend_backward(terms, relu, dz, room, add, means)
            for kernels, room in zip((native, TorchKernels()), g, strict=True)
        ]
        torch.testing.assert_close(*g, atol=tolerance, rtol=tolerance)
        if "scaled" in kind:
            torch.testing.assert_close(sums[0][0], sums[1][0], atol=1e-3, rtol=1e-3)
        for product, expected in zip(sums[0][1], sums[1][1], strict=True):
            torch.testing.assert_close(product, expected, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_moments_and_finish_agree(native, dtype, channels):
    x, g = strip(channels, dtype), strip(channels, dtype)
    wide = arithmetic_dtype(dtype)
    shift, scale, a, b = (torch.randn(channels, dtype=wide) for _ in range(4))
    copies = [strip(channels, dtype) for _ in range(2)]
    sums = [
        kernels.moments(x, shift, copy)
        for kernels, copy in zip((native, TorchKernels()), copies, strict=True)
    ]
    assert torch.equal(copies[0], x)
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    for y in (x, None):
        made = [strip(channels, dtype) for _ in range(2)]
        native.finish(g, scale, y, a, b, made[0])
        TorchKernels().finish(g, scale, y, a, b, made[1])
        torch.testing.assert_close(*made, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_may_be_written_where_it_is_read(native, dtype):
    (terms, means), dz = terms_for(("scaled",), 64, dtype), strip(64, dtype)
    apart = torch.empty_like(dz)
    native.blend_backward(terms, True, dz, apart, False, means)
    native.blend_backward(terms, True, dz, dz, False, means)
    assert torch.equal(apart, dz)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so(native, dtype):
    x = strip(32, dtype)
    x[0, 3, 2, 5] = torch.nan
    out = torch.empty_like(x)
    native.blend([Affine(x)], True, out)
    assert out.isnan().nonzero().tolist() == [[0, 3, 2, 5]]


def test_strips_are_rounded_as_torch_rounds(native):
    x = torch.randn(1, 32, 50, 50).contiguous(memory_format=torch.channels_last)
    wide = x.bfloat16()
    scale, shift = torch.full((32,), 1.37), torch.zeros(32)
    out = torch.empty_like(wide)
    native.blend([Affine(wide, scale, shift)], False, out)
    assert torch.equal(out, (wide.float() * 1.37).bfloat16())


def test_without_a_compiler_it_is_said_and_pytorch_computes(monkeypatch, tmp_path, caplog):
    from umtrain.streaming.kernels import create_kernels, native

    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("UMTRAIN_CACHE", str(tmp_path))
    native.native_kernels.cache_clear()
    try:
        with caplog.at_level("INFO", "umtrain"):
            kernels = create_kernels(torch.device("cpu"))
        assert isinstance(kernels, TorchKernels)
        assert "C compiler" in caplog.text
    finally:
        native.native_kernels.cache_clear()
