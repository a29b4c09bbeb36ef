import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.frame import (
    apply_letterbox,
    compose,
    inverse,
    network_width_px,
    plan_letterbox,
    transform,
)

SIDES = st.integers(1, 400)
COORDINATES = st.floats(-1e4, 1e4)


@given(SIDES, SIDES, SIDES, SIDES, COORDINATES, COORDINATES)
def test_points_come_back_from_the_network_frame(rows, columns, height, width, x, y):
    box = plan_letterbox((rows, columns), height, width)
    point = np.array([[x, y]])
    there = transform(point, box.to_network)
    assert transform(there, inverse(box.to_network)) == pytest.approx(point, abs=1e-6)


@given(SIDES, SIDES, SIDES, SIDES)
def test_the_image_fills_the_frame_one_way_and_is_centred_the_other(rows, columns, height, width):
    box = plan_letterbox((rows, columns), height, width)
    assert box.inner_height_px <= height
    assert box.inner_width_px <= width
    assert box.inner_height_px == height or box.inner_width_px == width
    assert 0 <= height - box.inner_height_px - 2 * box.top_px <= 1
    assert 0 <= width - box.inner_width_px - 2 * box.left_px <= 1


@given(SIDES, SIDES, SIDES, SIDES)
def test_the_edges_of_the_image_are_the_edges_of_its_place(rows, columns, height, width):
    box = plan_letterbox((rows, columns), height, width)
    corners = np.array([[-0.5, -0.5], [columns - 0.5, rows - 0.5]])
    expected = [
        [box.left_px - 0.5, box.top_px - 0.5],
        [box.left_px + box.inner_width_px - 0.5, box.top_px + box.inner_height_px - 0.5],
    ]
    assert transform(corners, box.to_network) == pytest.approx(np.array(expected), abs=1e-6)


@given(st.integers(200, 600), st.integers(100, 400), st.data())
def test_pixels_go_where_the_map_says(rows, columns, data):
    x = data.draw(st.floats(30, columns - 31))
    y = data.draw(st.floats(30, rows - 31))
    box = plan_letterbox((rows, columns), 128, 64)
    grid_y, grid_x = np.mgrid[:rows, :columns]
    spot = 60_000 * np.exp(-((grid_x - x) ** 2 + (grid_y - y) ** 2) / (2 * 6.0**2))
    frame = apply_letterbox(np.rint(spot).astype(np.uint16), box).astype(float)
    grid_y, grid_x = np.mgrid[:128, :64]
    seen = np.array([(grid_x * frame).sum(), (grid_y * frame).sum()]) / frame.sum()
    assert seen == pytest.approx(transform(np.array([[x, y]]), box.to_network)[0], abs=0.05)


def test_shrinking_averages_so_that_fine_patterns_become_grey():
    stripes = np.tile(np.array([0, 60_000], np.uint16), (512, 128))
    frame = apply_letterbox(stripes, plan_letterbox(stripes.shape, 64, 32))
    assert frame == pytest.approx(np.full((64, 32), 30_000), rel=0.05)


def test_around_the_image_is_zero():
    full = np.full((100, 100), 2**16 - 1, np.uint16)
    frame = apply_letterbox(full, plan_letterbox(full.shape, 64, 32))
    assert (frame[16:48] == 2**16 - 1).all()
    assert frame.sum(dtype=int) == frame[16:48].sum(dtype=int)


def test_an_image_of_the_frames_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 2**16, (64, 32), dtype=np.uint16)
    assert np.array_equal(apply_letterbox(pixels, plan_letterbox(pixels.shape, 64, 32)), pixels)


@given(st.integers(1, 20_000), st.floats(0.05, 4))
def test_the_width_is_the_nearest_multiple_of_64(res, aspect):
    width = network_width_px(res, aspect)
    assert width % 64 == 0
    assert width == 64 or abs(width - res * aspect) <= 32


def test_maps_compose_from_right_to_left():
    double = np.array([[2.0, 0, 0], [0, 2, 0]])
    shift = np.array([[1.0, 0, 5], [0, 1, 7]])
    assert transform(np.array([[1.0, 1.0]]), compose(shift, double)).tolist() == [[7.0, 9.0]]
