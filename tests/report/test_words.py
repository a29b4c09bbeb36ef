"""Numbers and verdicts in words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.evaluation.keypoints import radial_error_mm
from umtrain.report.plots_keypoints import radial_errors_mm
from umtrain.report.verdict import difference_words, run_verdict, shown_by, sweep_verdict
from umtrain.report.wording import estimate, images, interval, number, p_value

FINITE = st.floats(-1e6, 1e6)


@given(FINITE, st.integers(0, 5))
def test_a_number_is_read_back_to_its_last_digit(value, digits):
    text = number(value, digits)
    assert float(text.replace("−", "-")) == pytest.approx(value, abs=0.5001 * 10**-digits)
    assert "-" not in text
    assert not text.startswith("−0.00") or float(text.replace("−", "-")) != 0


@given(FINITE, FINITE)
def test_an_interval_never_runs_its_dash_into_a_minus(low, high):
    text = interval(sorted((low, high)))
    assert "–−" not in text
    assert len(text.replace(" to ", "–").split("–")) == 2


def test_what_is_not_known_is_a_dash():
    assert (number(None), interval(None), estimate(None, None)) == ("–", "–", "–")
    assert estimate(0.9, None) == "0.90"


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (0.0002, "p < 0.001"), (0.034, "p = 0.034"), (0.5, "p = 0.50")]
)
def test_p_has_as_many_digits_as_matter(p, text):
    assert p_value(p) == text


def test_one_image_is_not_plural():
    assert images("wsi", 1, "test") == "1 test slide"
    assert images("spine", 2) == "2 radiographs"


def test_the_verdict_on_slides_has_intervals_and_where_the_threshold_is_from(runs):
    section = runs.slide_section(runs.slide_predictions(60, 0))
    line = run_verdict(runs.record(test=section)).line
    assert line.startswith("On 60 test slides: AUC 0.97 (95% CI 0.89–0.99); sensitivity 0.93 (")
    assert line.endswith("at the threshold 0.41 (chosen on the validation split).")


def test_the_verdict_on_radiographs_has_bias_and_limits(runs):
    line = run_verdict(
        runs.record(dataset="spine", test=runs.film_section(runs.film_predictions(34, 0)))
    ).line
    assert line.startswith("On 34 test radiographs: SVA is off by 2.37 mm on average (95% CI ")
    assert "; bias 0.44 mm, limits of agreement −5.8 to 6.7 mm; within 3 mm of the truth" in line


def test_a_verdict_that_could_be_chance_says_so(runs):
    by_chance = run_verdict(runs.record()).cautions
    assert by_chance == ("The AUC's interval includes 0.5, which is chance.",)
    section = runs.slide_section(runs.slide_predictions(60, 0))
    assert run_verdict(runs.record(test=section)).cautions == ()


def test_a_verdict_from_validation_says_that_it_flatters(runs):
    section = runs.slide_section(runs.slide_predictions(60, 0))
    verdict = run_verdict(runs.record(test=None, val=section))
    assert "60 validation slides" in verdict.line
    assert "expect less on new ones" in verdict.cautions[0]


def test_a_sweep_names_best_and_worst_and_whether_that_means_anything(runs):
    def job(res, auc, bounds):
        return runs.record(test={"n": 9, "auc": auc, "auc_ci": bounds}, axes={"res": str(res)})

    apart = sweep_verdict([job(1, 0.6, [0.5, 0.7]), job(2, 0.9, [0.8, 0.95])])
    assert "Best test AUC: 0.90 (0.80–0.95) at res=2; worst: 0.60 (0.50–0.70) at res=1." in (
        apart.line
    )
    assert "picked by its test figure" in apart.cautions[0]
    close = sweep_verdict([job(1, 0.6, [0.5, 0.7]), job(2, 0.65, [0.55, 0.75])])
    assert "settles nothing" in close.cautions[0]


@pytest.mark.parametrize(
    ("dataset", "ci", "p", "shown"),
    [
        ("wsi", [0.1, 0.2], 0.01, "B is better"),
        ("wsi", [-0.2, -0.1], 0.01, "B is worse"),
        ("wsi", [-0.1, 0.2], 0.4, "no difference shown"),
        ("spine", [0.1, 0.2], 0.01, "B is worse"),
        ("spine", [-0.2, -0.1], 0.01, "B is better"),
        ("spine", [-0.2, -0.1], 0.2, "interval and p disagree: not settled"),
        ("spine", [-0.2, 0.1], 0.01, "interval and p disagree: not settled"),
    ],
)
def test_what_a_paired_test_shows_follows_from_its_interval(dataset, ci, p, shown):
    suffix = "_mm" if dataset == "spine" else ""
    test = {"run": "B", "against": "A", f"difference{suffix}": sum(ci) / 2, f"ci{suffix}": ci}
    assert shown_by(test | {"p": p}, dataset) == shown
    assert difference_words(test | {"p": p}, dataset).endswith(shown)


def test_a_test_that_could_not_be_had_says_why():
    test = {"run": "B", "against": "A", "difference": None, "difference_reason": "one class"}
    assert difference_words(test, "wsi") == "B − A: no test (one class)"


POINT = st.tuples(st.floats(0, 4000), st.floats(0, 4000))


@given(POINT, POINT, st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_distances_in_pictures_are_those_of_the_evaluation(true, pred, column_mm, row_mm):
    row = {"mm_per_px": str(column_mm), "row_mm_per_px": str(row_mm)}
    for kind, (x, y) in (("true", true), ("pred", pred)):
        row |= {f"c7_x_{kind}": str(x), f"c7_y_{kind}": str(y)}
    expected = radial_error_mm(np.array([true]), np.array([pred]), [[row_mm, column_mm]])
    assert radial_errors_mm([row], "c7") == pytest.approx(expected.tolist())
    assert radial_errors_mm([row | {"row_mm_per_px": ""}], "c7") is None
