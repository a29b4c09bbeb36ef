"""SVA and radial errors in mm, with the signs and spacings that DICOM gives them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.errors import DataError, UmtrainError
from umtrain.evaluation.keypoints import keypoint_metrics, radial_error_mm, sva_mm

pixels = st.floats(0, 4000)
spacings = st.floats(0.05, 2)
sides = st.sampled_from(["left", "right"])
OTHER = {"left": "right", "right": "left"}


def sva(c7_x: float, s1_x: float, spacing_mm: float, side: str) -> float:
    return float(sva_mm([[c7_x, 100.0]], [[s1_x, 900.0]], [spacing_mm], [side])[0])


def test_sva_is_positive_when_c7_is_in_front() -> None:
    assert sva(700, 600, 0.2, "right") == pytest.approx(20)
    assert sva(700, 600, 0.2, "left") == pytest.approx(-20)


@given(c7_x=pixels, s1_x=pixels, spacing_mm=spacings, side=sides)
def test_turning_the_patient_flips_the_sign(
    c7_x: float, s1_x: float, spacing_mm: float, side: str
) -> None:
    assert sva(c7_x, s1_x, spacing_mm, OTHER[side]) == -sva(c7_x, s1_x, spacing_mm, side)


@given(c7_x=pixels, s1_x=pixels, spacing_mm=spacings, side=sides)
def test_a_mirrored_image_of_a_mirrored_patient_measures_the_same(
    c7_x: float, s1_x: float, spacing_mm: float, side: str
) -> None:
    mirrored = sva(3999 - c7_x, 3999 - s1_x, spacing_mm, OTHER[side])
    assert mirrored == pytest.approx(sva(c7_x, s1_x, spacing_mm, side), abs=1e-6)


@given(c7_x=pixels, s1_x=pixels, spacing_mm=spacings, side=sides, factor=st.floats(0.1, 10))
def test_sva_scales_with_the_spacing(
    c7_x: float, s1_x: float, spacing_mm: float, side: str, factor: float
) -> None:
    scaled = sva(c7_x, s1_x, factor * spacing_mm, side)
    assert scaled == pytest.approx(factor * sva(c7_x, s1_x, spacing_mm, side))


def test_sva_is_horizontal() -> None:
    c7_xy, s1_xy = np.array([[700.0, 0.0]]), np.array([[600.0, 0.0]])
    for lower_px in (0.0, 500.0):
        moved = s1_xy + np.array([0.0, lower_px])
        assert sva_mm(c7_xy, moved, [0.2], ["right"]) == pytest.approx([20])


def test_radial_error_takes_row_spacing_down_and_column_spacing_across() -> None:
    errors = radial_error_mm([[0, 0], [0, 0]], [[3, 0], [0, 4]], [[0.5, 2.0], [0.5, 2.0]])
    assert errors == pytest.approx([6, 2])


@given(x=pixels, y=pixels, spacing_mm=spacings)
def test_radial_error_is_the_euclidean_distance_in_square_pixels(
    x: float, y: float, spacing_mm: float
) -> None:
    error_mm = radial_error_mm([[0, 0]], [[x, y]], [[spacing_mm, spacing_mm]])
    assert error_mm == pytest.approx([spacing_mm * np.hypot(x, y)])


def test_hand_worked_metrics_of_three_radiographs() -> None:
    true = np.array([[[100.0, 0.0], [90.0, 50.0]]] * 3)
    pred = true.copy()
    pred[0, 0] += (3, 4)  # C7 off by 5 px, 3 across: SVA off by 3 px
    pred[1, 1] += (-6, 8)  # S1 off by 10 px, 6 across: SVA off by 6 px
    pred[2] += (7, 0)  # both off by 7 px across: SVA right by luck
    metrics = keypoint_metrics(true, pred, np.full((3, 2), 0.5), ["right", "left", "right"])
    assert metrics["mae_mm"] == pytest.approx((1.5 + 3 + 0) / 3)
    assert metrics["median_ae_mm"] == pytest.approx(1.5)
    assert metrics["c7_radial_mm"] == pytest.approx({"mean": 2.0, "median": 2.5})
    assert metrics["s1_radial_mm"] == pytest.approx({"mean": 8.5 / 3, "median": 3.5})
    assert metrics["n"] == 3


def errors_of(sva_errors_px: list[float]) -> dict[str, object]:
    n_images = len(sva_errors_px)
    true = np.zeros((n_images, 2, 2))
    pred = true.copy()
    pred[:, 0, 0] = sva_errors_px
    return keypoint_metrics(true, pred, np.ones((n_images, 2)), ["right"] * n_images)


def test_no_image_has_no_error_and_says_why() -> None:
    none = errors_of([])
    assert (none["mae_mm"], none["mae_mm_reason"]) == (None, "the split has no images")
    assert none["c7_radial_mm"] is None


@pytest.mark.parametrize("errors_px", [[], [1.0], [1.0, 2.0]])
def test_metrics_are_json(errors_px: list[float]) -> None:
    assert json.loads(json.dumps(errors_of(errors_px), allow_nan=False))["n"] == len(errors_px)


def test_a_patient_who_faces_nowhere_has_no_sva() -> None:
    with pytest.raises(DataError, match="radiograph 1: facing is ''; expected 'left' or 'right'"):
        sva_mm(np.zeros((2, 2)), np.zeros((2, 2)), [1, 1], ["left", ""])


@pytest.mark.parametrize("spacing_mm", [0.0, -0.1, float("nan")])
def test_a_spacing_must_be_positive(spacing_mm: float) -> None:
    with pytest.raises(DataError, match=r"radiograph 1: the spacing is .*mm per pixel above 0"):
        radial_error_mm(np.zeros((2, 2)), np.zeros((2, 2)), [[0.2, 0.2], [0.2, spacing_mm]])


def test_a_diverged_model_is_named_as_such() -> None:
    with pytest.raises(UmtrainError, match=r"for 1 of 2 radiographs are not finite.*learning rate"):
        errors_of([1.0, float("nan")])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\).*got \(1, 2, 2\), \(1, 2\)"):
        keypoint_metrics(np.zeros((1, 2, 2)), np.zeros((1, 2)), np.ones((1, 2)), ["left"])
