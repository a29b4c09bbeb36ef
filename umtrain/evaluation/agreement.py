"""Agreement of two measurements of the same thing: limits of agreement, intraclass correlation."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import f, t

from umtrain.evaluation.intervals import TAILS, all_equal
from umtrain.evaluation.reasons import Section, without

Floats = NDArray[np.float64]

MIN_IMAGES = 3
ICC_KIND = "ICC(2,1): two-way random effects, absolute agreement, single measure"
_LIMITS_SD = 1.96


def bland_altman_mm(true_mm: ArrayLike, pred_mm: ArrayLike) -> Section:
    """Return the bias and the 95% limits of agreement of `pred_mm` with `true_mm`, (n,) each.

    Keys: `bias_mm`, the mean of predicted less true; `sd_mm`, the standard deviation of these
    differences; `lower_mm` and `upper_mm`, 1.96 standard deviations below and above the bias;
    `bias_ci_mm`, `lower_ci_mm` and `upper_ci_mm`, 95% intervals by Student's t with n - 1 degrees
    of freedom and the standard errors of Bland & Altman (Stat Methods Med Res 1999; 8:135-160).
    Images count as independent, as they do there. The intervals are None if all differences are
    equal.

    Raises ValueError for fewer than 3 images.
    """
    differences = np.asarray(pred_mm, dtype=float) - np.asarray(true_mm, dtype=float)
    n_images = _enough("limits of agreement need", differences)
    bias, sd = float(differences.mean()), float(differences.std(ddof=1))
    lower, upper = bias - _LIMITS_SD * sd, bias + _LIMITS_SD * sd
    section: Section = {"bias_mm": bias, "sd_mm": sd, "lower_mm": lower, "upper_mm": upper}
    if all_equal(differences):
        reason = "all differences are equal, which is no certainty"
        return section | without(reason, "bias_ci_mm", "lower_ci_mm", "upper_ci_mm")
    sd_half_width = float(t.ppf(TAILS[1], n_images - 1)) * sd
    of_bias = sd_half_width * (1 / n_images) ** 0.5
    of_limit = sd_half_width * (1 / n_images + _LIMITS_SD**2 / (2 * (n_images - 1))) ** 0.5
    return section | {
        "bias_ci_mm": [bias - of_bias, bias + of_bias],
        "lower_ci_mm": [lower - of_limit, lower + of_limit],
        "upper_ci_mm": [upper - of_limit, upper + of_limit],
    }


def icc_agreement(ratings: ArrayLike) -> Section:
    """Return the intraclass correlation of `ratings` (n images, k raters): ICC(2,1), fit for JSON.

    Keys: `value`, `ci`, its 95% interval [low, high], and `kind`. It is the two-way random
    effects, absolute agreement, single measure correlation of Shrout & Fleiss (Psychol Bull 1979;
    86:420-428), ICC(A,1) of McGraw & Wong (Psychol Methods 1996; 1:30-46), whose interval this
    is. Images count as independent. The value is None if all ratings are equal, the interval also
    if the ratings leave no error, as with perfect agreement.

    Raises ValueError for fewer than 3 images or 2 raters.
    """
    table = np.asarray(ratings, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"expected ratings of shape (n, k), k at least 2; got {table.shape}")
    _enough("an intraclass correlation needs", table)
    if all_equal(table):
        return without("all ratings are equal", "value", "ci") | {"kind": ICC_KIND}
    squares = _mean_squares(table)
    value = _icc(squares, *table.shape)
    interval = _icc_interval(value, squares, *table.shape)
    if interval is None:
        missing = without("the ratings have no error to draw an interval from", "ci")
        return {"value": value, **missing, "kind": ICC_KIND}
    return {"value": value, "ci": interval, "kind": ICC_KIND}


class _MeanSquares(NamedTuple):
    """Mean squares of a two-way analysis of variance without replication."""

    images: float
    raters: float
    error: float


def _mean_squares(table: Floats) -> _MeanSquares:
    n_images, n_raters = table.shape
    centred = table - table.mean()
    of_image = centred.mean(axis=1, keepdims=True)
    of_rater = centred.mean(axis=0, keepdims=True)
    residual = centred - of_image - of_rater
    return _MeanSquares(
        images=n_raters * float((of_image**2).sum()) / (n_images - 1),
        raters=n_images * float((of_rater**2).sum()) / (n_raters - 1),
        error=float((residual**2).sum()) / ((n_images - 1) * (n_raters - 1)),
    )


def _icc(squares: _MeanSquares, n: int, k: int) -> float:
    between, raters, error = squares
    return (between - error) / (between + (k - 1) * error + k * (raters - error) / n)


def _icc_interval(icc: float, squares: _MeanSquares, n: int, k: int) -> list[float] | None:
    """Return the interval in McGraw & Wong's table 7, None without any error to draw it from."""
    between, raters, error = squares
    # Their a and b, both times 1 - icc, which leaves the ratio as it is and bears an icc of 1.
    # Below 0 the weights would cancel, and the degrees of freedom with them: those of 0 are taken.
    weight = max(icc, 0.0)
    a = k * weight / n * raters
    b = (1 - weight + k * weight * (n - 1) / n) * error
    spread = a**2 / (k - 1) + b**2 / ((n - 1) * (k - 1))
    if raters + error <= 1e-15 * between or spread == 0:
        return None
    freedom = (a + b) ** 2 / spread
    rest = k * raters + (k * n - k - n) * error
    f_low, f_high = f.ppf(TAILS[1], n - 1, freedom), f.ppf(TAILS[1], freedom, n - 1)
    low = n * (between - f_low * error) / (f_low * rest + n * between)
    high = n * (f_high * between - error) / (rest + n * f_high * between)
    return [float(low), float(high)]


def _enough(need: str, values: Floats) -> int:
    n_images = len(values)
    if n_images < MIN_IMAGES:
        raise ValueError(f"{need} at least {MIN_IMAGES} images; got {n_images}")
    return n_images
