"""The threshold against brute force, shares at it against published intervals."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, roc_curve

from umtrain.errors import UmtrainError
from umtrain.evaluation.intervals import wilson_interval
from umtrain.evaluation.operating_point import choose_threshold, operating_point

cases = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10)), min_size=2, max_size=30).map(
    lambda pairs: (np.array([y for y, _ in pairs]), np.array([s / 10 for _, s in pairs]))
)


def youden(labels, probs, threshold):
    called = probs >= threshold
    return called[labels == 1].mean() - called[labels == 0].mean()


@given(cases)
def test_no_threshold_has_a_larger_youden_index(case):
    labels, probs = case
    assume(0 < labels.sum() < len(labels))
    fpr, tpr, _ = roc_curve(labels, probs, drop_intermediate=False)
    chosen = choose_threshold(labels, probs)
    assert 0 <= chosen <= 1
    assert youden(labels, probs, chosen) == pytest.approx((tpr - fpr).max())


@given(case=cases, rng=st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(case, rng):
    labels, probs = case
    order = list(range(len(labels)))
    rng.shuffle(order)
    assert choose_threshold(labels[order], probs[order]) == choose_threshold(labels, probs)


@pytest.mark.parametrize(
    ("labels", "probs", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.5),  # halfway between the neighbours
        ([0, 1, 0, 1], [0.1, 0.3, 0.6, 0.8], 0.2),  # 0.2 and 0.7 are as good: the lower
        ([0, 1, 0, 1, 0, 1], [0.1, 0.2, 0.4, 0.6, 0.8, 0.9], 0.5),  # 0.15, 0.5, 0.85: the middle
        ([0, 1], [0.3, 0.3], 0.15),  # nothing to choose by: all are called positive
        ([1, 0], [0.4, 0.6], 0.2),  # worse than chance between them: all are called positive
        ([1, 0], [0.0, 1.0], 0.0),
        ([0, 1], [0.0, 1.0], 0.5),
    ],
)
def test_hand_worked_thresholds(labels, probs, expected):
    assert choose_threshold(labels, probs) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_one_class_has_no_threshold(labels):
    assert choose_threshold(labels, [0.5] * len(labels)) is None


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got 0.1 to 2.0"):
        choose_threshold([0, 1], [0.1, 2.0])
    with pytest.raises(UmtrainError, match="1 of 2 predictions are not finite"):
        choose_threshold([0, 1], [0.1, float("nan")])


# Newcombe, Stat Med 1998; 17:857-872, table I, method 3.
@pytest.mark.parametrize(
    ("n_successes", "n_trials", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilsons_interval_is_as_published(n_successes, n_trials, expected):
    assert wilson_interval(n_successes, n_trials) == pytest.approx(expected, abs=5e-5)


@given(case=cases, threshold=st.integers(0, 10).map(lambda tenth: tenth / 10))
def test_counts_are_scikit_learns_and_intervals_hold_the_shares(case, threshold):
    labels, probs = case
    found = operating_point(labels == 1, probs, threshold)
    tn, fp, fn, tp = confusion_matrix(labels, probs >= threshold, labels=[0, 1]).ravel()
    assert found["confusion"] == {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
    shares = {
        "accuracy": (tp + tn, len(labels)),
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
    }
    for key, (n_right, n_images) in shares.items():
        if n_images:
            low, high = found[f"{key}_ci"]
            assert found[key] == pytest.approx(n_right / n_images)
            assert 0 <= low <= found[key] + 1e-12
            assert found[key] - 1e-12 <= high <= 1
        else:
            assert found[key] is None
            assert found[f"{key}_ci"] is None


def test_what_is_missing_is_named():
    found = operating_point(np.array([True]), np.array([0.7]), 0.5)
    assert found["specificity_reason"] == "the split has no negative images"
    assert found["specificity_ci_reason"] == "the split has no negative images"
    none = operating_point(np.zeros(0, dtype=bool), np.zeros(0), 0.5)
    assert none["accuracy_reason"] == "the split has no images"
    assert none["confusion"] == {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
