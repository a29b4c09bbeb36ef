"""Brier score and calibration bins against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from umtrain.evaluation.calibration import calibration_evidence
from umtrain.evaluation.intervals import wilson_interval

cases = st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=1, max_size=80).map(
    lambda pairs: (np.array([p for p, _ in pairs]), np.array([s / 40 for _, s in pairs]))
)


@given(cases)
def test_brier_is_scikit_learns(case):
    positive, probs = case
    expected = brier_score_loss(positive, probs, pos_label=True, labels=[False, True])
    assert calibration_evidence(positive, probs)["brier"] == pytest.approx(expected)


@given(st.integers(1, 10), st.integers(1, 4), st.randoms(use_true_random=False))
def test_bins_of_distinct_probabilities_are_scikit_learns_quantile_bins(n_bins, n_fives, rng):
    n_images = n_bins * 5 * (n_fives if n_bins == 10 else 1)
    probs = np.array(rng.sample(range(1000), n_images)) / 1000
    positive = np.arange(n_images) % 2 == 0
    bins = calibration_evidence(positive, probs)["calibration"]
    shares, means = calibration_curve(positive, probs, n_bins=n_bins, strategy="quantile")
    assert [found["share_positive"] for found in bins] == pytest.approx(shares)
    assert [found["prob_mean"] for found in bins] == pytest.approx(means)


@given(cases)
def test_every_image_is_in_one_bin_and_bins_are_in_order(case):
    positive, probs = case
    bins = calibration_evidence(positive, probs)["calibration"]
    assert 1 <= len(bins) <= min(10, max(1, len(probs) // 5))
    assert sum(found["n"] for found in bins) == len(probs)
    n_positive = sum(found["n"] * found["share_positive"] for found in bins)
    assert n_positive == pytest.approx(positive.sum())
    means = [found["prob_mean"] for found in bins]
    assert means == sorted(means)
    assert len(set(means)) == len(means)


@given(case=cases, rng=st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(case, rng):
    positive, probs = case
    order = list(range(len(probs)))
    rng.shuffle(order)
    expected = calibration_evidence(positive, probs)["calibration"]
    shuffled = calibration_evidence(positive[order], probs[order])["calibration"]
    assert [found["ci"] for found in shuffled] == [found["ci"] for found in expected]
    assert [found["prob_mean"] for found in shuffled] == pytest.approx(
        [found["prob_mean"] for found in expected]
    )


def test_many_images_make_ten_bins_of_equal_size_and_wilsons_intervals():
    probs = np.arange(200) / 199
    bins = calibration_evidence(np.arange(200) % 4 == 0, probs)["calibration"]
    assert [found["n"] for found in bins] == [20] * 10
    assert bins[0]["share_positive"] == 0.25
    assert bins[0]["ci"] == wilson_interval(5, 20)
    assert bins[0]["prob_mean"] == pytest.approx(probs[:20].mean())


@pytest.mark.parametrize(("n_images", "n_bins"), [(1, 1), (9, 1), (10, 2), (24, 4), (50, 10)])
def test_few_images_make_fewer_bins(n_images, n_bins):
    bins = calibration_evidence(np.ones(n_images, dtype=bool), np.arange(n_images) / n_images)
    assert len(bins["calibration"]) == n_bins


def test_equal_probabilities_share_a_bin():
    bins = calibration_evidence(np.arange(60) % 3 == 0, np.repeat([0.2, 0.7], [50, 10]))
    assert [(found["prob_mean"], found["n"]) for found in bins["calibration"]] == [
        (pytest.approx(0.2), 50),
        (pytest.approx(0.7), 10),
    ]


def test_no_images_have_neither_and_say_why():
    found = calibration_evidence(np.zeros(0, dtype=bool), np.zeros(0))
    assert found == {
        "brier": None,
        "calibration": None,
        "brier_reason": "the split has no images",
        "calibration_reason": "the split has no images",
    }
