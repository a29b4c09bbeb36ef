"""The record's section of radiographs: every key, and a reason for each figure that is missing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umtrain.errors import UmtrainError
from umtrain.evaluation.agreement import bland_altman_mm, icc_agreement
from umtrain.evaluation.keypoints import keypoint_evidence, keypoint_metrics

KEYS = {
    *("mae_mm", "mae_ci_mm", "median_ae_mm", "median_ae_ci_mm", "c7_radial_mm", "s1_radial_mm"),
    *("bland_altman", "icc", "success", "n", "n_patients"),
}


def evidence(sva_errors_px, patients=None, spacing_mm=1.0):
    """Return the evidence of radiographs with different SVAs, C7 off by the errors along x."""
    n_images = len(sva_errors_px)
    true = np.zeros((n_images, 2, 2))
    true[:, 0, 0] = 10.0 * np.arange(n_images)
    pred = true.copy()
    pred[:, 0, 0] += sva_errors_px
    spacing = np.full((n_images, 2), spacing_mm)
    return keypoint_evidence(true, pred, spacing, ["right"] * n_images, patients)


@pytest.mark.parametrize("errors_px", [[], [1], [1, 2], [1, -2, 4], [2, 2, 2, 2], [0, 0, 0]])
def test_any_split_has_every_key_or_its_reason_as_json(errors_px):
    section = evidence(errors_px)
    assert {key for key in section if not key.endswith("_reason")} == KEYS
    for part in (section, section["bland_altman"] or {}, section["icc"] or {}):
        missing = {key for key, value in part.items() if value is None}
        assert {f"{key}_reason" for key in missing} == {k for k in part if k.endswith("_reason")}
    assert json.loads(json.dumps(section, allow_nan=False)) == section
    assert (section["n"], section["n_patients"]) == (len(errors_px), len(errors_px))


@settings(max_examples=20)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_intervals_stay_among_the_errors_and_hold_the_mean(errors_px):
    section = evidence(errors_px)
    sizes = np.abs(errors_px)
    for name in ("mae", "median_ae"):
        if section[f"{name}_ci_mm"] is not None:
            low, high = section[f"{name}_ci_mm"]
            assert sizes.min() - 1e-9 <= low <= section[f"{name}_mm"] + 1e-9
            assert section[f"{name}_mm"] - 1e-9 <= high <= sizes.max() + 1e-9


def test_interval_is_near_the_normal_one_for_many_images_and_the_same_every_time():
    errors = np.abs(np.random.default_rng(0).normal(size=400))
    low, high = evidence(errors)["mae_ci_mm"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(errors) / 20, rel=0.1)
    assert evidence(errors)["mae_ci_mm"] == [low, high]


def test_agreement_is_that_of_the_svas():
    errors = np.array([1.0, -2, 4, 0, 3])
    section = evidence(errors, spacing_mm=0.5)
    true = 5.0 * np.arange(5)
    expected = bland_altman_mm(true, true + errors / 2)
    for key, value in expected.items():
        assert section["bland_altman"][key] == pytest.approx(value)
    assert section["bland_altman"]["bias_mm"] == pytest.approx(0.6)
    assert section["icc"]["value"] == pytest.approx(
        icc_agreement(np.column_stack([true, true + errors / 2]))["value"]
    )


def test_success_counts_radial_errors_up_to_the_limit():
    section = evidence([2, 2.25, 3, 4.5, 9, 0, 2.75, 1])
    assert section["success"]["c7"] == {
        "2": 3 / 8,
        "2.5": 4 / 8,
        "3": 6 / 8,
        "4": 6 / 8,
        "5": 7 / 8,
    }
    assert section["success"]["s1"] == dict.fromkeys(("2", "2.5", "3", "4", "5"), 1.0)


def test_films_of_one_patient_widen_the_bootstrap_alone():
    errors = np.repeat(np.random.default_rng(1).exponential(size=20), 4)
    alone, grouped = evidence(errors), evidence(errors, np.repeat(np.arange(20), 4))
    for key in ("mae_ci_mm", "median_ae_ci_mm"):
        assert np.ptp(grouped[key]) > 1.4 * np.ptp(alone[key])
    assert grouped["bland_altman"] == alone["bland_altman"]
    assert (grouped["n_patients"], alone["n_patients"]) == (20, 80)


@settings(max_examples=20)
@given(st.permutations(range(6)))
def test_the_order_of_images_does_not_matter(order):
    rng = np.random.default_rng(2)
    true, pred = rng.normal(size=(2, 6, 2, 2))
    spacing, sides = rng.uniform(0.1, 1, (6, 2)), np.array(["left", "right"] * 3)
    patients = np.array(["a", "b", "c", "d", "d", "e"])
    expected = keypoint_evidence(true, pred, spacing, sides, patients)
    found = keypoint_evidence(*(values[order] for values in (true, pred, spacing, sides, patients)))
    for key in ("mae_ci_mm", "median_ae_ci_mm", "c7_radial_mm"):
        assert found[key] == pytest.approx(expected[key])
    for key, value in expected["bland_altman"].items():
        assert found["bland_altman"][key] == pytest.approx(value)
    assert found["icc"]["ci"] == pytest.approx(expected["icc"]["ci"])
    assert found["success"] == expected["success"]


def test_quick_metrics_are_part_of_the_evidence():
    rng = np.random.default_rng(3)
    case = (*rng.normal(size=(2, 5, 2, 2)), np.ones((5, 2)), ["left"] * 5)
    quick = keypoint_metrics(*case)
    section = keypoint_evidence(*case)
    assert {key: section[key] for key in quick} == quick


def test_few_images_say_what_they_lack():
    one, two = evidence([3.0]), evidence([3.0, 1.0])
    assert one["mae_mm"] == 3
    assert one["mae_ci_mm_reason"] == "images of one patient alone have no spread to resample"
    assert two["icc_reason"] == "agreement needs at least 3 images; the split has 2"
    assert two["bland_altman_reason"] == two["icc_reason"]
    assert evidence([])["success_reason"] == "the split has no images"


def test_patients_and_predictions_are_checked():
    with pytest.raises(ValueError, match=r"a patient for each of 2 radiographs; got \(3,\)"):
        evidence([1, 2], ["a", "b", "c"])
    with pytest.raises(UmtrainError, match="1 of 2 radiographs are not finite"):
        evidence([1, float("nan")])
