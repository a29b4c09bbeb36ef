"""Limits of agreement and intraclass correlation against published examples."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from umtrain.evaluation.agreement import ICC_KIND, bland_altman_mm, icc_agreement

# Peak expiratory flow by two meters, l/min: Bland & Altman, Lancet 1986; 327:307-310.
WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI_WRIGHT = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]
# Shrout & Fleiss, Psychol Bull 1979; 86:420-428, table 2: six targets, four judges.
SHROUT_FLEISS = [
    [9, 2, 5, 8],
    [6, 1, 3, 2],
    [8, 4, 6, 8],
    [7, 1, 2, 6],
    [10, 5, 6, 9],
    [6, 2, 4, 7],
]

readings = st.lists(
    st.tuples(st.integers(-100, 100), st.integers(-100, 100)), min_size=3, max_size=20
).map(lambda pairs: np.array(pairs, dtype=float))


def test_bias_and_its_interval_are_as_published():
    found = bland_altman_mm(MINI_WRIGHT, WRIGHT)
    assert found["bias_mm"] == pytest.approx(-2.1, abs=0.05)
    assert found["sd_mm"] == pytest.approx(38.8, abs=0.05)
    assert found["bias_ci_mm"] == pytest.approx([-22.0, 17.8], abs=0.1)


def test_limits_are_196_deviations_away_with_the_standard_errors_of_1999():
    found = bland_altman_mm(MINI_WRIGHT, WRIGHT)
    assert found["lower_mm"] == pytest.approx(-2.118 - 1.96 * 38.765, abs=0.01)
    assert found["upper_mm"] == pytest.approx(-2.118 + 1.96 * 38.765, abs=0.01)
    # sqrt(1/17 + 1.96^2 / (2 * 16)) = 0.42293 deviations; t with 16 degrees of freedom is 2.1199.
    # The paper of 1986 rounds 0.42293 to sqrt(3/17) = 0.42008.
    half_width = 2.1199 * 0.42293 * 38.765
    for limit in ("lower", "upper"):
        centre = found[f"{limit}_mm"]
        assert found[f"{limit}_ci_mm"] == pytest.approx(
            [centre - half_width, centre + half_width], abs=0.01
        )


def test_about_95_of_100_new_differences_lie_between_the_limits():
    rng = np.random.default_rng(0)
    found = bland_altman_mm(np.zeros(4000), rng.normal(2, 5, 4000))
    new = rng.normal(2, 5, 4000)
    share = ((new > found["lower_mm"]) & (new < found["upper_mm"])).mean()
    assert share == pytest.approx(0.95, abs=0.015)


def test_intervals_of_limits_cover_the_true_limits_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        low, high = bland_altman_mm(np.zeros(40), rng.normal(size=40))["upper_ci_mm"]
        covered += low <= 1.96 <= high
    assert 0.92 <= covered / 600 <= 0.98


@given(readings)
def test_swapping_the_two_mirrors_the_limits(pairs):
    assume(np.ptp(pairs[:, 0] - pairs[:, 1]) > 0)
    there, back = bland_altman_mm(*pairs.T), bland_altman_mm(*pairs.T[::-1])
    assert back["bias_mm"] == pytest.approx(-there["bias_mm"])
    assert back["upper_mm"] == pytest.approx(-there["lower_mm"])
    assert back["upper_ci_mm"] == pytest.approx([-bound for bound in there["lower_ci_mm"][::-1]])


@given(readings)
def test_bias_is_a_paired_t_tests(pairs):
    assume(np.ptp(pairs[:, 0] - pairs[:, 1]) > 0)
    interval = stats.ttest_rel(pairs[:, 1], pairs[:, 0]).confidence_interval()
    assert bland_altman_mm(*pairs.T)["bias_ci_mm"] == pytest.approx(list(interval))


def test_a_constant_difference_is_a_bias_without_interval():
    found = bland_altman_mm([1, 2, 5], [3, 4, 7])
    assert (found["bias_mm"], found["sd_mm"], found["upper_mm"]) == (2, 0, 2)
    for key in ("bias_ci_mm", "lower_ci_mm", "upper_ci_mm"):
        assert found[key] is None
        assert found[f"{key}_reason"] == "all differences are equal, which is no certainty"


def test_icc_is_as_published():
    found = icc_agreement(SHROUT_FLEISS)
    assert found["value"] == pytest.approx(0.29, abs=0.005)
    assert found["ci"] == pytest.approx([0.019, 0.761], abs=0.0005)
    assert found["kind"] == ICC_KIND


@given(readings)
def test_interval_holds_the_correlation(pairs):
    assume(np.ptp(pairs) > 0)
    found = icc_agreement(pairs)
    if found["ci"] is not None:
        low, high = found["ci"]
        assert low - 1e-9 <= found["value"] <= high + 1e-9
        assert high <= 1


@given(pairs=readings, shift=st.integers(-500, 500), factor=st.sampled_from([0.1, -1, 7]))
def test_icc_knows_no_origin_no_unit_and_no_order(pairs, shift, factor):
    assume(np.ptp(pairs) > 0)
    value = icc_agreement(pairs)["value"]
    assert icc_agreement(factor * pairs + shift)["value"] == pytest.approx(value, abs=1e-6)
    assert icc_agreement(pairs[::-1, ::-1])["value"] == pytest.approx(value, abs=1e-9)


def test_an_offset_is_disagreement():
    true = np.array([0.0, 10, 20, 30, 40])
    assert icc_agreement(np.column_stack([true, true + 20]))["value"] < 0.7
    assert stats.pearsonr(true, true + 20).statistic == pytest.approx(1)


def test_perfect_agreement_is_no_certainty():
    found = icc_agreement([[1, 1], [2, 2], [4, 4]])
    assert found["value"] == pytest.approx(1)
    assert found["ci"] is None
    assert found["ci_reason"] == "the ratings have no error to draw an interval from"


def test_raters_that_say_the_same_of_every_image_know_nothing_of_images():
    found = icc_agreement([[1, 2], [1, 2], [1, 2]])
    assert (found["value"], found["ci"]) == (0, None)


def test_disagreement_is_a_negative_correlation_with_an_interval():
    found = icc_agreement([[0, 2], [3, 1], [1, 3], [2, 2], [4, 1], [2, 5]])
    low, high = found["ci"]
    assert low < found["value"] < 0 < high < 1


def test_equal_ratings_have_no_correlation():
    found = icc_agreement(np.full((4, 2), 0.3))
    assert (found["value"], found["value_reason"]) == (None, "all ratings are equal")
    assert (found["ci"], found["ci_reason"]) == (None, "all ratings are equal")


def test_interval_covers_the_true_correlation_about_95_times_in_100():
    # Variance 4 between images and 1 of error, raters without bias: the correlation is 0.8.
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        table = 2 * rng.normal(size=(25, 1)) + rng.normal(size=(25, 2))
        low, high = icc_agreement(table)["ci"]
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_too_few_images_and_raters_are_refused():
    with pytest.raises(ValueError, match="limits of agreement need at least 3 images; got 2"):
        bland_altman_mm([1, 2], [1, 3])
    with pytest.raises(ValueError, match="an intraclass correlation needs at least 3 images"):
        icc_agreement([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"shape \(n, k\), k at least 2; got \(3, 1\)"):
        icc_agreement([[1], [2], [3]])
