"""ROC and precision-recall curves against scikit-learn and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from umtrain.evaluation import bootstrap
from umtrain.evaluation.curves import GRID, curve_evidence

# Few distinct scores, so that ties are common; both classes, each from two patients or more.
cases = (
    st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=25)
    .map(lambda pairs: [(True, 3), (True, 5), (False, 2), (False, 3), *pairs])
    .map(lambda pairs: (np.array([p for p, _ in pairs]), np.array([s / 6 for _, s in pairs])))
)


def evidence(positive, scores, patients=None):
    positive, scores = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=float)
    return curve_evidence(
        positive, scores, np.arange(len(scores)) if patients is None else patients
    )


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "N_RESAMPLES", 60)
    return 60


@settings(max_examples=15)
@given(cases)
def test_average_precision_and_curves_are_scikit_learns(case):
    positive, scores = case
    found = evidence(positive, scores)
    assert found["average_precision"] == pytest.approx(average_precision_score(positive, scores))
    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    roc = found["curves"]["roc"]
    assert roc["fpr"] == GRID.tolist()
    assert roc["tpr"] == pytest.approx(np.interp(GRID, fpr, tpr), abs=1e-6)
    assert found["curves"]["pr"]["precision"] == pytest.approx(
        precision_by_brute_force(positive, scores), abs=1e-6
    )
    assert found["curves"]["pr"]["prevalence"] == pytest.approx(positive.mean())


def precision_by_brute_force(positive, scores, weights=None):
    """Return at each recall the precision of the highest threshold that reaches it."""
    precision, recall, _ = precision_recall_curve(positive, scores, sample_weight=weights)
    # Without the point at recall 0 that scikit-learn adds, of precision 1 and no threshold.
    points = [(r, p) for r, p in zip(recall[:-1], precision[:-1], strict=True) if r > 0]
    return [min((r, -i, p) for i, (r, p) in enumerate(points) if r >= g - 1e-12)[2] for g in GRID]


def test_hand_worked_curves():
    # From the top: + - + + -. Precision is 1 to recall 1/3, then 2/3 and 3/4.
    found = evidence([1, 0, 1, 1, 0], [0.9, 0.8, 0.7, 0.6, 0.5])
    roc, pr = found["curves"]["roc"], found["curves"]["pr"]
    assert [roc["tpr"][i] for i in (0, 49, 50, 99, 100)] == pytest.approx(
        [1 / 3, 1 / 3, 1, 1, 1], abs=1e-6
    )
    assert [pr["precision"][i] for i in (0, 33, 34, 66, 67, 100)] == pytest.approx(
        [1, 1, 2 / 3, 2 / 3, 3 / 4, 3 / 4], abs=1e-6
    )
    assert found["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_intervals_and_bands_are_those_of_a_loop_over_resamples(few_resamples):
    rng = np.random.default_rng(4)
    positive = rng.random(30) < 0.5
    scores = np.round(rng.normal(size=30) + positive)  # with ties across the classes
    found = evidence(positive, scores)
    aucs, precisions, rocs, prs = [], [], [], []
    for drawn in np.random.default_rng(0).integers(30, size=(few_resamples, 30)):
        labels, values = positive[drawn], scores[drawn]
        aucs.append(roc_auc_score(labels, values))
        precisions.append(average_precision_score(labels, values))
        fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
        rocs.append(np.interp(GRID, fpr, tpr))
        prs.append(precision_by_brute_force(labels, values))
    tails = (0.025, 0.975)
    assert found["auc_ci_bootstrap"] == pytest.approx(np.quantile(aucs, tails))
    assert found["average_precision_ci"] == pytest.approx(np.quantile(precisions, tails))
    for name, curves in (("roc", rocs), ("pr", prs)):
        low, high = np.quantile(curves, tails, axis=0)
        assert found["curves"][name]["low"] == pytest.approx(low, abs=1e-6)
        assert found["curves"][name]["high"] == pytest.approx(high, abs=1e-6)


@settings(max_examples=8)
@given(cases)
def test_a_monotone_transform_of_the_scores_changes_nothing(case):
    positive, scores = case
    assert evidence(positive, np.exp(3 * scores) - 7) == evidence(positive, scores)


@settings(max_examples=8)
@given(case=cases, seed=st.integers(0, 99))
def test_the_order_of_images_does_not_matter(case, seed):
    positive, scores = case
    patients = np.arange(len(scores)) // 2
    order = np.random.default_rng(seed).permutation(len(scores))
    assert evidence(positive[order], scores[order], patients[order]) == evidence(
        positive, scores, patients
    )


def test_a_band_rises_and_lies_around_the_curve():
    rng = np.random.default_rng(5)
    positive = np.arange(200) % 2 == 0
    roc = evidence(positive, rng.normal(size=200) + positive)["curves"]["roc"]
    low, curve, high = (np.array(roc[key]) for key in ("low", "tpr", "high"))
    assert (low <= curve).all()
    assert (curve <= high).all()
    assert (np.diff(low) >= 0).all()
    assert 0.05 < (high - low).mean() < 0.3


def test_images_that_repeat_a_patient_add_no_certainty():
    rng = np.random.default_rng(6)
    positive = np.arange(20) % 2 == 0
    scores, patients = rng.normal(size=20) + positive, np.arange(20)
    once = evidence(positive, scores, patients)
    thrice = evidence(*(np.repeat(values, 3) for values in (positive, scores, patients)))
    assert thrice["auc_ci_bootstrap"] == pytest.approx(once["auc_ci_bootstrap"])
    assert thrice["average_precision_ci"] == pytest.approx(once["average_precision_ci"])
    assert thrice["curves"] == once["curves"]


def test_resamples_with_one_class_are_drawn_again():
    # One resample in seven would miss both positive patients.
    found = evidence([1, 1, *[0] * 18], [0.9, 0.3, *np.linspace(0, 0.8, 18)])
    low, high = found["auc_ci_bootstrap"]
    assert 0 < low < high <= 1


def test_perfect_separation_is_no_certainty():
    found = evidence([1, 1, 1, 0, 0], [0.9, 0.8, 0.7, 0.2, 0.1])
    reason = "every resample has the same value, which is no certainty"
    assert found["auc_ci_bootstrap"] is None
    assert found["auc_ci_bootstrap_reason"] == reason
    assert found["average_precision"] == 1
    assert found["average_precision_ci_reason"] == reason
    assert set(found["curves"]["roc"]["tpr"]) == {1.0}
    assert found["curves"]["roc"]["low"] is None
    assert found["curves"]["roc"]["low_reason"] == reason


def test_a_class_of_one_patient_has_no_interval():
    found = evidence([1, 1, 0, 0], [0.9, 0.3, 0.5, 0.1], ["a", "a", "b", "c"])
    assert found["auc_ci_bootstrap"] is None
    assert found["auc_ci_bootstrap_reason"] == (
        "a bootstrap over patients needs two patients with images of each class; the split has "
        "1 with positive and 2 with negative images"
    )
    assert found["curves"]["pr"]["high"] is None
    assert len(found["curves"]["pr"]["precision"]) == 101
