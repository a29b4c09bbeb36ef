"""The bootstrap over patients against loops that draw the images themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from umtrain.evaluation import bootstrap
from umtrain.evaluation.bootstrap import (
    N_RESAMPLES,
    patient_interval,
    resample_counts,
    weighted_mean,
    weighted_median,
)

values_of_images = st.lists(st.floats(-100, 100), min_size=3, max_size=25, unique=True)


def interval(values, patients, statistic=weighted_mean):
    return patient_interval("ci", patients, statistic(np.asarray(values, dtype=float)))["ci"]


@settings(max_examples=20)
@given(values_of_images)
def test_one_image_a_patient_is_the_plain_bootstrap(values):
    drawn = np.random.default_rng(0).choice(values, (N_RESAMPLES, len(values)))
    patients = np.arange(len(values))
    for statistic, plain in ((weighted_mean, np.mean), (weighted_median, np.median)):
        expected = np.quantile(plain(drawn, axis=1), (0.025, 0.975))
        assert interval(values, patients, statistic) == pytest.approx(expected, abs=1e-9)


def test_the_plain_bootstrap_is_scipys_but_for_the_draws():
    values = np.random.default_rng(1).exponential(size=60)
    theirs = stats.bootstrap(
        (values,), np.median, n_resamples=N_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    ours = interval(values, np.arange(60), weighted_median)
    assert ours == pytest.approx(theirs, abs=0.1 * np.ptp(theirs))


@pytest.mark.parametrize("statistic", [weighted_mean, weighted_median])
def test_images_that_repeat_a_patient_add_no_certainty(statistic):
    values = np.random.default_rng(2).normal(size=12)
    patients = np.arange(12)
    once = interval(values, patients, statistic)
    thrice = interval(np.repeat(values, 3), np.repeat(patients, 3), statistic)
    as_if_independent = interval(np.repeat(values, 3), np.arange(36), statistic)
    assert thrice == pytest.approx(once)
    assert np.ptp(as_if_independent) < 0.8 * np.ptp(once)


def test_all_images_of_a_patient_come_together():
    patients = np.array(["b", "a", "b", "c", "a"])
    n_rows = 0
    for counts in resample_counts(patients):
        n_rows += len(counts)
        assert np.array_equal(counts[:, 0], counts[:, 2])
        assert np.array_equal(counts[:, 1], counts[:, 4])
        assert (counts[:, 0] + counts[:, 1] + counts[:, 3] == 3).all()
    assert n_rows == N_RESAMPLES


@settings(max_examples=20)
@given(
    images=st.lists(
        st.tuples(st.integers(-9, 9), st.sampled_from("abcd")), min_size=4, max_size=12
    ).filter(lambda images: len({patient for _, patient in images}) > 1),
    rng=st.randoms(use_true_random=False),
)
def test_the_order_of_images_does_not_matter(images, rng):
    shuffled = list(images)
    rng.shuffle(shuffled)
    assert interval(*zip(*shuffled, strict=True)) == interval(*zip(*images, strict=True))


def test_an_unusable_resample_is_drawn_again():
    patients = np.arange(4)
    blocks = resample_counts(patients, lambda counts: counts[:, 0] > 0)
    counts = np.concatenate(list(blocks))
    assert len(counts) == N_RESAMPLES
    assert (counts[:, 0] > 0).all()
    # Mean of a binomial(4, 1/4), given that it is not 0.
    assert counts[:, 0].mean() == pytest.approx(1 / (1 - 0.75**4), rel=0.03)


def test_small_blocks_hold_as_many_resamples_in_all(monkeypatch):
    monkeypatch.setattr(bootstrap, "_N_IN_BLOCK", 700)
    blocks = list(resample_counts(np.arange(7)))
    assert max(map(len, blocks)) == 100
    assert sum(map(len, blocks)) == N_RESAMPLES


def test_one_patient_and_equal_values_have_no_interval():
    one = patient_interval("ci", ["a", "a"], weighted_mean(np.array([1.0, 2.0])))
    assert one["ci"] is None
    assert one["ci_reason"] == "images of one patient alone have no spread to resample"
    equal = patient_interval("ci", ["a", "b", "c"], weighted_mean(np.full(3, 0.1)))
    assert equal["ci"] is None
    assert equal["ci_reason"] == "every resample has the same value, which is no certainty"


def test_interval_of_clustered_images_covers_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(40), 3)
    covered = 0
    for _ in range(200):
        low, high = interval(rng.normal(size=40)[patients] + rng.normal(size=120), patients)
        covered += low <= 0 <= high
    assert 0.90 <= covered / 200 <= 0.98
