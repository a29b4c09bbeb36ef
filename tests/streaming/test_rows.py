import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from umtrain.streaming.rows import Enlargement, Window, strips

small = st.integers(1, 5)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 60))
def test_strips_cover_every_row_of_every_image_once(n_images, n_rows, rows_per_strip):
    cut = list(strips(n_images, n_rows, rows_per_strip))
    rows = [
        (i, r) for s in cut for i in range(s.image, s.image_end) for r in range(s.first, s.last)
    ]
    assert rows == [(i, r) for i in range(n_images) for r in range(n_rows)]


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 60))
def test_a_strip_of_several_images_has_all_of_their_rows(n_images, n_rows, rows_per_strip):
    for strip in strips(n_images, n_rows, rows_per_strip):
        if strip.image_end - strip.image > 1:
            assert (strip.first, strip.last) == (0, n_rows)


@given(small, small, st.integers(0, 3), st.integers(1, 3), st.integers(12, 40), st.data())
def test_a_window_names_the_rows_that_a_convolution_reads(
    kernel, stride, padding, dilation, height, data
):
    weight = torch.ones(1, 1, kernel, 1)
    x = torch.zeros(1, 1, height, 1)
    n_out = functional.conv2d(x, weight, None, stride, (padding, 0), (dilation, 1)).shape[2]
    first = data.draw(st.integers(0, n_out - 1))
    last = data.draw(st.integers(first + 1, n_out))
    start, stop = Window(kernel, stride, padding, dilation).input_rows(first, last)
    touched = [
        row
        for row in range(height)
        if functional.conv2d(
            x.index_fill(2, torch.tensor([row]), 1.0),
            weight,
            None,
            stride,
            (padding, 0),
            (dilation, 1),
        )[:, :, first:last].any()
    ]
    assert all(start <= row < stop for row in touched)
    assert start == first * stride - padding
    assert (stop - start - dilation * (kernel - 1) - 1) % stride == 0


@given(st.integers(1, 4), st.sampled_from(["nearest", "bilinear"]), st.integers(2, 12), st.data())
def test_an_enlargement_names_all_rows_that_upsampling_reads(factor, mode, height, data):
    first = data.draw(st.integers(0, height * factor - 1))
    last = data.draw(st.integers(first + 1, height * factor))
    halo = 0 if mode == "nearest" else 1
    start, stop = Enlargement(factor, halo, height).input_rows(first, last)
    x = torch.randn(1, 1, height, 3)
    other = x.clone()
    other[:, :, :start] += 1
    other[:, :, stop:] += 1
    corners = None if mode == "nearest" else False
    a, b = (
        functional.interpolate(v, scale_factor=factor, mode=mode, align_corners=corners)
        for v in (x, other)
    )
    assert torch.equal(a[:, :, first:last], b[:, :, first:last])
