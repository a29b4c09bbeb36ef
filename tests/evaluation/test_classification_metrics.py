"""AUC against scikit-learn and brute force; its interval against hand-worked cases."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from umtrain.errors import UmtrainError
from umtrain.evaluation.classification import classification_metrics, roc_auc

# Few distinct values, so that ties are common.
cases = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=2, max_size=40).map(
    lambda pairs: (
        np.array([int(label) for label, _ in pairs]),
        np.array([score / 8 for _, score in pairs]),
    )
)


def has_both_classes(labels: NDArray[np.int_]) -> bool:
    return 0 < labels.sum() < len(labels)


def brute_force_delong_variance(labels: NDArray[np.int_], scores: NDArray[np.float64]) -> float:
    """Return DeLong's variance from all pairs, as the paper writes it."""
    pos, neg = scores[labels == 1], scores[labels == 0]
    order = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)
    auc = order.mean()
    s10 = ((order.mean(axis=1) - auc) ** 2).sum() / (len(pos) - 1)
    s01 = ((order.mean(axis=0) - auc) ** 2).sum() / (len(neg) - 1)
    return float(s10 / len(pos) + s01 / len(neg))


@given(cases)
def test_auc_is_scikit_learns(case: tuple[NDArray[np.int_], NDArray[np.float64]]) -> None:
    labels, scores = case
    assume(has_both_classes(labels))
    assert roc_auc(labels, scores).auc == pytest.approx(roc_auc_score(labels, scores))


@given(cases)
def test_interval_is_delongs_from_all_pairs_around_the_logit(
    case: tuple[NDArray[np.int_], NDArray[np.float64]],
) -> None:
    labels, scores = case
    assume(2 <= labels.sum() <= len(labels) - 2)
    result = roc_auc(labels, scores)
    variance = brute_force_delong_variance(labels, scores)
    assume(variance > 1e-9)
    half_width = 1.959964 * math.sqrt(variance) / (result.auc * (1 - result.auc))
    centre = math.log(result.auc / (1 - result.auc))
    expected = [1 / (1 + math.exp(-(centre + sign * half_width))) for sign in (-1, 1)]
    assert result.ci_method == "delong"
    assert result.ci == pytest.approx(expected, rel=1e-5)


@given(cases)
def test_interval_holds_the_estimate_and_is_never_certain(
    case: tuple[NDArray[np.int_], NDArray[np.float64]],
) -> None:
    labels, scores = case
    assume(has_both_classes(labels))
    result = roc_auc(labels, scores)
    low, high = result.ci
    assert 0 <= low <= result.auc <= high <= 1
    assert high - low > 0.01


@given(cases)
def test_auc_does_not_change_under_a_monotone_transform(
    case: tuple[NDArray[np.int_], NDArray[np.float64]],
) -> None:
    labels, scores = case
    assume(has_both_classes(labels))
    assert roc_auc(labels, np.exp(3 * scores) - 7) == roc_auc(labels, scores)


@given(cases)
def test_swapping_the_classes_mirrors_auc_and_interval(
    case: tuple[NDArray[np.int_], NDArray[np.float64]],
) -> None:
    labels, scores = case
    assume(has_both_classes(labels))
    result, mirrored = roc_auc(labels, scores), roc_auc(1 - labels, scores)
    assert mirrored.auc == pytest.approx(1 - result.auc)
    assert mirrored.ci == pytest.approx((1 - result.ci[1], 1 - result.ci[0]))


def test_hand_worked_case() -> None:
    # Positives .8 .6 .4 against negatives .7 .3 .1: 7 of 9 pairs in order.
    # Placements: positives 1, 2/3, 2/3; negatives 1/3, 1, 1. Their variances (n - 1) are 1/27 and
    # 4/27, so the variance of the AUC is (1/27 + 4/27) / 3 = 5/81.
    # logit(7/9) = ln 3.5 = 1.25276; half width 1.95996·√(5/81) / (7/9·2/9) = 2.81739.
    result = roc_auc([1, 1, 1, 0, 0, 0], [0.8, 0.6, 0.4, 0.7, 0.3, 0.1])
    assert result.auc == pytest.approx(7 / 9)
    assert result.ci == pytest.approx((0.17298, 0.98321), abs=1e-5)


def test_perfect_separation_is_as_certain_as_its_number_of_pairs() -> None:
    labels, scores = [1] * 10 + [0] * 30, [0.9] * 10 + [0.1] * 30
    result = roc_auc(labels, scores)
    exact = binomtest(10, 10).proportion_ci(0.95, method="exact")
    assert (result.auc, result.ci_method) == (1.0, "clopper-pearson")
    assert result.ci == pytest.approx((exact.low, 1.0))
    assert result.ci[0] == pytest.approx(0.025 ** (1 / 10))


def test_equal_scores_know_nothing() -> None:
    result = roc_auc([1] * 5 + [0] * 5, [0.3] * 10)
    assert result.auc == 0.5
    assert result.ci[0] < 0.15
    assert result.ci[1] > 0.85


def test_interval_covers_the_true_auc_about_95_times_in_100() -> None:
    # Two normals one standard deviation apart: AUC = Φ(1/√2).
    true_auc = 0.5 * (1 + math.erf(0.5))
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 25])
    covered = 0
    for _ in range(400):
        low, high = roc_auc(labels, rng.normal(size=65) + labels).ci
        covered += low <= true_auc <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_metrics_of_a_small_split() -> None:
    metrics = classification_metrics([1, 1, 0, 0, 0], [0.9, 0.5, 0.6, 0.2, 0.1])
    assert metrics["auc"] == pytest.approx(5 / 6)
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert (metrics["n_pos"], metrics["n_neg"]) == (2, 3)
    assert metrics["auc_ci_method"] == "delong"


def test_threshold_itself_is_positive_and_moves_the_accuracy() -> None:
    labels, probs = [1, 0], [0.25, 0.2]
    assert classification_metrics(labels, probs)["accuracy"] == 0.5
    assert classification_metrics(labels, probs, threshold=0.25)["accuracy"] == 1.0


def test_one_class_has_no_auc_but_a_reason() -> None:
    metrics = classification_metrics([1, 1], [0.9, 0.2])
    assert metrics["auc"] is None
    assert metrics["auc_ci"] is None
    assert (
        metrics["auc_reason"] == "AUC needs both classes; the split has 2 positive and 0 negative"
    )
    assert metrics["accuracy"] == 0.5


def test_an_empty_split_has_neither_and_says_why() -> None:
    metrics = classification_metrics([], [])
    assert metrics["accuracy"] is None
    assert metrics["accuracy_reason"] == "the split has no images"
    assert metrics["auc"] is None


def test_a_diverged_model_is_named_as_such() -> None:
    with pytest.raises(UmtrainError, match=r"2 of 3 predictions are not finite.*learning rate"):
        roc_auc([0, 1, 1], [0.1, math.nan, math.inf])


def test_one_class_is_no_input_for_an_auc() -> None:
    with pytest.raises(ValueError, match="needs both classes; got 0 positive and 2 negative"):
        roc_auc([0, 0], [0.1, 0.2])


def test_lengths_labels_and_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match=r"one shape \(n,\); got \(2,\) and \(3,\)"):
        roc_auc([0, 1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"labels must be 0 or 1; got \[0, 2\]"):
        roc_auc([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got 0.1 to 2.0"):
        classification_metrics([0, 1], [0.1, 2.0])
