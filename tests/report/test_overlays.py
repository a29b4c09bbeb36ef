"""Pictures of single cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from umtrain.report.overlays import (
    Keypoints,
    crop_box,
    map_beside_slide,
    round_length,
    save_picture,
    sva_on_film,
)

POINTS = st.tuples(st.floats(0, 1999), st.floats(0, 2999))
SPACING_MM = (0.15, 0.15)


def drawn(canvas, path):
    save_picture(canvas, path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def keypoints(c7_xy, s1_xy, sva_mm=0.0):
    return Keypoints(c7_xy, s1_xy, sva_mm)


def texts(canvas):
    return " ".join(
        text.get_text() for text in canvas.findobj(match=lambda a: hasattr(a, "get_text"))
    )


def rendered(canvas):
    drawn = FigureCanvasAgg(canvas)
    drawn.draw()
    return np.asarray(drawn.buffer_rgba())[..., :3].astype(int)


def test_a_map_colours_the_second_slide_where_it_is_high_and_only_there():
    slide = np.full((100, 100, 3), (230, 180, 210), np.uint8)
    values = np.zeros((100, 100))
    values[:50, :50] = 1
    with_map, without = (
        rendered(map_beside_slide(slide, shown, title="a", meaning="b"))
        for shown in (values, 0 * values)
    )
    changed = np.abs(with_map - without).sum(axis=2) > 30
    height, width = changed.shape
    rows, columns = np.nonzero(changed)
    assert 0.15 < changed.sum() / (height * width / 2) < 0.25  # a quarter of one of two slides
    assert columns.min() > 0.45 * width
    assert rows.max() < 0.6 * height


def test_levels_that_a_map_crosses_are_lines():
    slide = np.full((50, 50, 3), 200, np.uint8)
    values = np.tile(np.linspace(0, 0.7, 50), (50, 1))
    plain, lined = (
        rendered(map_beside_slide(slide, values, title="", meaning="", levels=levels))
        for levels in ((), (0.5, 0.75))
    )
    changed = np.abs(plain - lined).sum(axis=2) > 100
    assert 300 < changed.sum() < 3000


def test_a_picture_is_of_256_colours_and_close_to_the_full_ones(tmp_path):
    slide = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    canvas = map_beside_slide(slide, np.zeros((64, 64)), title="", meaning="")
    saved = drawn(canvas, tmp_path / "a.png")
    assert len(np.unique(saved.reshape(-1, 3), axis=0)) <= 256
    assert np.abs(saved - rendered(canvas)).mean() < 20


def test_a_scale_bar_is_there_where_its_length_is_known():
    slide, values = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100))
    known = map_beside_slide(slide, values, title="", meaning="", um_per_px=80.0)
    unknown = map_beside_slide(slide, values, title="", meaning="")
    assert "2 mm" in texts(known)
    assert " mm" not in texts(unknown)


def test_dollar_signs_in_a_title_are_no_formula(tmp_path):
    slide, values = np.zeros((10, 10, 3), np.uint8), np.zeros((10, 10))
    canvas = map_beside_slide(slide, values, title="$\\frac{", meaning="")
    save_picture(canvas, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


@given(st.floats(1e-3, 1e6))
def test_lengths_are_round_and_most_of_what_there_is_room_for(most):
    length = round_length(most)
    assert 0.39 * most < length <= most * (1 + 1e-9)
    assert f"{length:.0e}"[0] in "125"


@given(POINTS, POINTS, POINTS, POINTS)
def test_the_part_of_a_film_that_is_shown_has_all_keypoints(a, b, c, d):
    shape = (3000, 2000)
    x0, y0, x1, y1 = crop_box(shape, keypoints(a, b), keypoints(c, d), SPACING_MM)
    assert 0 <= x0 < x1 <= 2000
    assert 0 <= y0 < y1 <= 3000
    for x, y in (a, b, c, d):
        assert x0 - 1 <= x <= x1
        assert y0 - 1 <= y <= y1


def test_a_spine_is_shown_with_what_is_around_it():
    true = keypoints((1000, 500), (1010, 2500))
    x0, y0, x1, y1 = crop_box((3000, 2000), true, true, SPACING_MM)
    assert (y0, y1) == (260, 2740)
    assert x1 - x0 == pytest.approx((y1 - y0) / 2, abs=1)


def test_a_film_shows_both_axes_and_the_error_in_mm(tmp_path):
    film = np.random.default_rng(0).integers(0, 2**16, (3000, 2000)).astype(np.uint16)
    true = keypoints((900, 500), (1000, 2500), 15.0)
    predicted = keypoints((1100, 520), (990, 2480), -16.5)
    canvas = sva_on_film(film, true, predicted, SPACING_MM)
    shown = texts(canvas)
    assert "SVA error 31.5 mm" in shown
    assert "true: SVA +15.0 mm" in shown
    assert "predicted: SVA -16.5 mm" in shown
    pixels = drawn(canvas, tmp_path / "film.png")
    blue = (np.abs(pixels - (0x56, 0xB4, 0xE9)).sum(axis=2) < 60).sum()
    orange = (np.abs(pixels - (0xE6, 0x9F, 0x00)).sum(axis=2) < 60).sum()
    assert blue > 300
    assert orange > 300
    assert pixels.shape[0] < 1050
    assert (tmp_path / "film.png").stat().st_size < 500_000  # of noise, the worst film there is


def test_a_film_with_pixels_that_are_not_square_keeps_its_proportions():
    film = np.zeros((1500, 2000), np.uint16)
    points = keypoints((1000, 250), (1000, 1250))
    canvas = sva_on_film(film, points, points, (0.3, 0.15))
    (axes,) = canvas.axes
    canvas.draw_without_rendering()
    box = axes.get_window_extent()
    x0, x1 = axes.get_xlim()
    y1, y0 = axes.get_ylim()
    assert box.width / box.height == pytest.approx((x1 - x0) * 0.15 / ((y1 - y0) * 0.3), rel=0.01)
