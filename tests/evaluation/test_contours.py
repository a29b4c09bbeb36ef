"""Maps on images: where they lie, and contours that hold exactly what reaches a level."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.path import Path as Outline

from umtrain.evaluation.contours import Area, Level, MapGrid, contour_collection

GRID = MapGrid(0.5, 0.5, 32)
HALF = Level(0.5, "half", (33, 145, 140))
MAPS = arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.floats(0, 1))


def unchanged(x, y):
    return x, y


def collection(values, area=None, levels=(HALF,), to_l0=unchanged, grid=GRID):
    values = np.asarray(values, dtype=float)
    whole = Area(0, 0, 32 * values.shape[1], 32 * values.shape[0])
    return contour_collection(values, grid, area or whole, levels, to_l0)


def polygons(found):
    return [feature["geometry"]["coordinates"] for feature in found["features"]]


def holds(polygon, point):
    return sum(Outline(ring).contains_point(point) for ring in polygon) % 2 == 1


@given(MAPS)
def test_a_centre_is_in_a_contour_where_the_map_reaches_the_level_and_nowhere_else(values):
    found = polygons(collection(values))
    for (row, column), value in np.ndenumerate(values):
        if abs(value - 0.5) > 0.01:
            centre = 0.5 + 32 * column, 0.5 + 32 * row
            assert any(holds(polygon, centre) for polygon in found) == (value > 0.5)


@given(MAPS, st.floats(-20, 40), st.floats(60, 300))
def test_rings_are_closed_have_an_area_and_stay_inside(values, low_px, high_px):
    area = Area(low_px, 0.0, high_px, 64.0)
    for polygon in polygons(collection(values, area)):
        for ring in polygon:
            x, y = np.array(ring).T
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            assert abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) > 0
            assert low_px - 0.01 <= x.min()
            assert x.max() <= high_px + 0.01
            assert y.min() >= 0
            assert y.max() <= 64


def test_a_region_with_a_gap_is_one_polygon_with_a_hole():
    values = np.ones((5, 5))
    values[2, 2] = 0
    (polygon,) = polygons(collection(values))
    outer, hole = polygon
    assert np.ptp(outer, axis=0).tolist() == [160, 160]
    assert np.ptp(hole, axis=0).tolist() == [32, 32]  # half way to each neighbour


def test_rows_and_columns_may_start_at_different_places():
    grid = MapGrid(first_x_px=100, first_y_px=10, stride_px=20)
    (polygon,) = polygons(collection(np.eye(3) * [0, 1, 0], Area(0, 0, 300, 300), grid=grid))
    x, y = np.array(polygon[0]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (110, 130, 20, 40)


def test_the_border_of_the_slide_ends_a_contour():
    (polygon,) = polygons(collection(np.ones((4, 4)), Area(16, 0, 112, 128)))
    x, y = np.array(polygon[0]).T
    assert (x.min(), y.min(), x.max(), y.max()) == (16, 0, 112, 128)


def test_contours_are_in_the_pixels_that_they_are_asked_in():
    values = np.zeros((3, 3))
    values[1, 1] = 1
    (polygon,) = polygons(collection(values, to_l0=lambda x, y: (100 + 4 * x, 200 + 4 * y)))
    x, y = np.array(polygon[0]).T
    assert (x.min(), x.max()) == (100 + 4 * 16.5, 100 + 4 * 48.5)
    assert (y.min(), y.max()) == (200 + 4 * 16.5, 200 + 4 * 48.5)


def test_a_map_below_all_levels_has_no_features():
    assert collection(np.zeros((4, 4))) == {"type": "FeatureCollection", "features": []}


def test_features_are_annotations_with_a_class_and_its_colour_largest_first():
    values = np.zeros((6, 6))
    values[0, 0] = 0.6
    values[3:, 3:] = 1
    levels = (HALF, Level(0.75, "three quarters", (94, 201, 98)))
    found = json.loads(json.dumps(collection(values, levels=levels)))
    classes = [feature["properties"]["classification"] for feature in found["features"]]
    assert [c["name"] for c in classes] == ["half", "half", "three quarters"]
    assert classes[0]["color"] == [33, 145, 140]
    assert {f["properties"]["objectType"] for f in found["features"]} == {"annotation"}
    sizes = [np.ptp(polygon[0], axis=0).prod() for polygon in polygons(found)]
    assert sizes[0] > sizes[1]


def test_a_level_of_nothing_is_refused():
    with pytest.raises(ValueError, match="level above 0"):
        collection(np.ones((2, 2)), levels=[Level(0.0, "all", (0, 0, 0))])


@given(MAPS)
def test_a_map_has_its_own_values_at_its_centres(values):
    x_px, y_px = GRID.x_px(values.shape[1]), GRID.y_px(values.shape[0])
    np.testing.assert_allclose(GRID.sample(values, x_px, y_px), values, atol=1e-12)


def test_a_raster_places_patches_where_they_are():
    patches = MapGrid(32, 32, 64)  # two by two patches of 64 pixels
    raster = patches.raster(np.array([[0, 1], [0, 0]]), side_px=128, n_shown=8)
    assert raster[0, 7] == 1
    assert raster[0, 0] == raster[7, 7] == raster[7, 0] == 0
    assert raster[0, 3] == pytest.approx(0.375)  # of the way from the left centre to the right
