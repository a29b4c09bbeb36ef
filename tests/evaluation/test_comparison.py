"""Paired tests against DeLong's formulas over all pairs, and scipy."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from umtrain.errors import UmtrainError
from umtrain.evaluation.comparison import paired_auc_test, paired_error_test

cases = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 8), st.integers(0, 8)), min_size=4, max_size=40
).map(lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True)))


def brute_force_variance(labels, scores_a, scores_b):
    """Return the variance of the difference by DeLong's matrices, as the paper writes them."""
    placed = []
    for scores in (scores_a, scores_b):
        pos, neg = scores[labels == 1][:, None], scores[labels == 0]
        placed.append((pos > neg) + 0.5 * (pos == neg))
    s10 = np.cov([order.mean(axis=1) for order in placed])
    s01 = np.cov([order.mean(axis=0) for order in placed])
    covariance = s10 / (labels == 1).sum() + s01 / (labels == 0).sum()
    contrast = np.array([1, -1])
    return float(contrast @ covariance @ contrast)


@given(cases)
def test_it_is_delongs_test_over_all_pairs(case):
    labels, a, b = case
    assume(2 <= labels.sum() <= len(labels) - 2)
    found = paired_auc_test(labels, a, b)
    assert found["auc_a"] == pytest.approx(roc_auc_score(labels, a))
    assert found["auc_b"] == pytest.approx(roc_auc_score(labels, b))
    assert found["difference"] == pytest.approx(found["auc_a"] - found["auc_b"], abs=1e-12)
    variance = brute_force_variance(labels, a, b)
    assume(variance > 1e-12)
    z = found["difference"] / math.sqrt(variance)
    assert found["z"] == pytest.approx(z, abs=1e-9)
    assert found["p"] == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=1e-9)
    half_width = 1.959964 * math.sqrt(variance)
    low, high = found["ci"]
    assert low == pytest.approx(max(-1, found["difference"] - half_width), abs=1e-6)
    assert high == pytest.approx(min(1, found["difference"] + half_width), abs=1e-6)


@given(cases)
def test_swapping_the_models_flips_the_sign(case):
    labels, a, b = case
    there, back = paired_auc_test(labels, a, b), paired_auc_test(labels, b, a)
    assert (back["auc_a"], back["p"]) == (there["auc_b"], there["p"])
    if there["z"] is not None:
        assert (back["difference"], back["z"]) == (-there["difference"], -there["z"])
        assert back["ci"] == [-there["ci"][1], -there["ci"][0]]


@given(case=cases, seed=st.integers(0, 99))
def test_order_of_images_and_scale_of_scores_do_not_matter(case, seed):
    labels, a, b = case
    order = np.random.default_rng(seed).permutation(len(labels))
    expected = paired_auc_test(labels, a, b)
    shuffled = paired_auc_test(labels[order], np.exp(a[order] / 3), b[order] ** 3)
    for key in ("difference", "z", "p", "ci"):
        assert shuffled[key] == pytest.approx(expected[key], abs=1e-9)


def test_hand_worked_case():
    # A separates; B has its first positive below the first negative, one of 4 pairs lost.
    # B's placements: positives 1/2, 1; negatives 1/2, 1. A less B: 1/2, 0 and 1/2, 0.
    # Variance (1/8)/2 + (1/8)/2 = 1/8, so z = (1/4) / sqrt(1/8) = 0.70711.
    found = paired_auc_test([1, 1, 0, 0], [0.8, 0.9, 0.2, 0.1], [0.5, 0.9, 0.6, 0.1])
    assert found["difference"] == pytest.approx(0.25)
    assert found["z"] == pytest.approx(math.sqrt(0.5))
    assert found["p"] == pytest.approx(0.4795, abs=1e-4)


def test_models_that_order_alike_have_no_test():
    labels, scores = [0, 1, 0, 1, 1], np.array([0.1, 0.3, 0.4, 0.7, 0.9])
    found = paired_auc_test(labels, scores, scores**2)
    assert found["difference"] == 0
    assert found["auc_a"] == found["auc_b"]
    for key in ("ci", "z", "p"):
        assert found[key] is None
        assert "the difference has no variance" in found[f"{key}_reason"]


def test_a_difference_without_variance_is_not_significant_but_untested():
    # Perfect against knowing nothing: each placement differs by the same half.
    found = paired_auc_test([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0.5] * 6)
    assert found["difference"] == 0.5
    assert found["p"] is None


def test_one_image_of_a_class_has_no_variance():
    found = paired_auc_test([1, 0, 0], [0.9, 0.5, 0.1], [0.2, 0.5, 0.1])
    assert found["difference"] == 0.5
    assert (
        found["p_reason"] == "a variance needs two images of each class; got 1 positive, 2 negative"
    )


@pytest.mark.parametrize("labels", [[], [1, 1]])
def test_one_class_has_no_comparison(labels):
    found = paired_auc_test(labels, [0.1] * len(labels), [0.2] * len(labels))
    for key in ("auc_a", "auc_b", "difference", "ci", "z", "p"):
        assert found[key] is None
        assert found[f"{key}_reason"].startswith("AUC needs both classes")


def test_scores_are_checked():
    with pytest.raises(ValueError, match=r"one shape \(n,\); got \(2,\) and \(3,\)"):
        paired_auc_test([0, 1], [0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(UmtrainError, match="1 of 2 predictions are not finite"):
        paired_auc_test([0, 1], [0.1, 0.2], [0.1, math.inf])


def test_p_is_below_5_in_100_about_5_times_in_100_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 40])
    n_below = 0
    for _ in range(500):
        shared = rng.normal(size=100) + labels
        a, b = (shared + rng.normal(size=100) for _ in range(2))
        n_below += paired_auc_test(labels, a, b)["p"] < 0.05
    assert 0.03 <= n_below / 500 <= 0.075


def test_errors_of_hand_worked_pairs():
    a, b = [1.0, 2.0, 3.0, 4.0, 5.5], [2.0, 4.0, 6.0, 8.0, 5.0]
    found = paired_error_test(a, b)
    assert found["difference_mm"] == pytest.approx(-1.9)
    low, high = found["ci_mm"]
    assert low < -1.9 < high < 0.5
    # Signed ranks: only the smallest is positive, 3 of 32 sign patterns are at most as extreme
    # as 1 on one side (sums 0 and 1), so p is 2 * 2 / 32.
    assert found["p"] == pytest.approx(4 / 32)
    assert found["n"] == 5


@settings(max_examples=8)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=30).filter(
        lambda pairs: len({a - b for a, b in pairs}) > 1
    )
)
def test_errors_are_scipys_and_swapping_flips_the_sign(pairs):
    a, b = np.array(pairs, dtype=float).T
    there, back = paired_error_test(a, b), paired_error_test(b, a)
    assert there["p"] == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert back["difference_mm"] == pytest.approx(-there["difference_mm"])
    assert back["p"] == pytest.approx(there["p"])
    assert back["ci_mm"] == pytest.approx([-there["ci_mm"][1], -there["ci_mm"][0]])


def test_images_that_repeat_a_patient_add_no_certainty():
    rng = np.random.default_rng(1)
    a, b = np.repeat(rng.exponential(size=(2, 15)), 4, axis=1)
    by_patient = paired_error_test(a, b, np.repeat(np.arange(15), 4))["ci_mm"]
    by_image = paired_error_test(a, b)["ci_mm"]
    assert np.ptp(by_image) < 0.7 * np.ptp(by_patient)


def test_equal_and_absent_errors_have_no_test():
    same = paired_error_test([1, 2, 3], [1, 2, 3])
    assert (same["difference_mm"], same["p"]) == (0, None)
    assert same["p_reason"] == "the two models have the same error on every image"
    assert same["ci_mm_reason"] == "every resample has the same value, which is no certainty"
    none = paired_error_test([], [])
    assert (none["n"], none["difference_mm"]) == (0, None)
    assert none["p_reason"] == "the split has no images"


def test_errors_are_checked():
    with pytest.raises(ValueError, match=r"one shape \(n,\); got \(2,\) and \(1,\)"):
        paired_error_test([1, 2], [1])
    with pytest.raises(ValueError, match="errors must be absolute: finite and not below 0"):
        paired_error_test([1, -2], [1, 2])
