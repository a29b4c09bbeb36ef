"""The record's section of slides: every key, and a reason for each figure that is missing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umtrain.evaluation.classification import (
    classification_evidence,
    classification_metrics,
    roc_auc,
)

KEYS = {
    *("auc", "auc_ci", "auc_ci_method", "auc_ci_bootstrap"),
    *("average_precision", "average_precision_ci", "accuracy", "accuracy_ci"),
    *("threshold", "threshold_from", "sensitivity", "sensitivity_ci", "specificity"),
    *("specificity_ci", "confusion", "brier", "calibration", "curves", "n_pos", "n_neg"),
    "n_patients",
}


def evidence(labels, probs, patients=None, threshold=0.5):
    patients = [f"p{i}" for i in range(len(labels))] if patients is None else patients
    return classification_evidence(labels, probs, patients, threshold, "said by a test")


def assert_missing_is_explained(section):
    """Every null has a reason beside it, and only nulls have one, however deep."""
    for key, value in section.items():
        if key.endswith("_reason"):
            assert section[key.removesuffix("_reason")] is None
            assert value
        elif value is None:
            assert f"{key}_reason" in section, key
        elif isinstance(value, dict):
            assert_missing_is_explained(value)


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.sampled_from("abcd")), max_size=12)
)
def test_any_split_has_every_key_or_its_reason_as_json(images):
    labels, probs, patients = zip(*images, strict=True) if images else ((), (), ())
    section = evidence(labels, np.array(probs) / 4, patients)
    assert {key for key in section if not key.endswith("_reason")} == KEYS
    assert_missing_is_explained(section)
    assert json.loads(json.dumps(section, allow_nan=False)) == section
    assert section["n_patients"] == len(set(patients))
    assert sum(section["confusion"].values()) == len(labels)


def test_an_ordinary_split_lacks_nothing():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    probs = 1 / (1 + np.exp(-rng.normal(size=60) - labels))
    section = evidence(labels, probs)
    assert not [key for key in section if key.endswith("_reason")]
    assert section["auc"] == roc_auc(labels, probs).auc
    assert section["auc_ci"] == list(roc_auc(labels, probs).ci)
    quick = classification_metrics(labels, probs)
    assert {key: section[key] for key in quick} == quick
    # DeLong's interval and the bootstrap's are two ways to the same thing.
    assert section["auc_ci_bootstrap"] == pytest.approx(section["auc_ci"], abs=0.04)


def test_threshold_moves_what_depends_on_it_and_nothing_else():
    labels, probs = [0, 0, 1, 1, 1], [0.1, 0.6, 0.4, 0.7, 0.9]
    low, high = evidence(labels, probs, threshold=0.4), evidence(labels, probs, threshold=0.65)
    assert (low["sensitivity"], low["specificity"]) == (1, 0.5)
    assert (high["sensitivity"], high["specificity"]) == (pytest.approx(2 / 3), 1)
    assert (low["threshold"], low["threshold_from"]) == (0.4, "said by a test")
    assert low["curves"] == high["curves"]
    assert low["auc"] == high["auc"]


def test_one_class_keeps_what_it_can():
    section = evidence([1, 1, 1], [0.9, 0.6, 0.3])
    reason = "AUC needs both classes; the split has 3 positive and 0 negative"
    for key in ("auc", "auc_ci", "auc_ci_bootstrap", "average_precision", "curves"):
        assert (section[key], section[f"{key}_reason"]) == (None, reason)
    assert section["sensitivity"] == pytest.approx(2 / 3)
    assert section["specificity_reason"] == "the split has no negative images"
    assert section["brier"] == pytest.approx((0.01 + 0.16 + 0.49) / 3)


def test_slides_of_one_patient_widen_the_bootstrap_alone():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(20) % 2, 5)
    probs = 1 / (1 + np.exp(-np.repeat(rng.normal(size=20), 5) - labels))
    alone, grouped = evidence(labels, probs), evidence(labels, probs, np.repeat(np.arange(20), 5))
    assert np.ptp(grouped["auc_ci_bootstrap"]) > 1.5 * np.ptp(alone["auc_ci_bootstrap"])
    assert grouped["auc_ci"] == alone["auc_ci"]
    assert (grouped["n_patients"], alone["n_patients"]) == (20, 100)


def test_patients_are_counted_like_images():
    with pytest.raises(ValueError, match=r"a patient for each of 2 images; got \(1,\)"):
        evidence([0, 1], [0.1, 0.9], ["a"])
