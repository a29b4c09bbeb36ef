"""Whether one model is better than another on the same images: paired tests."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, wilcoxon

from umtrain.evaluation.bootstrap import patient_interval, weighted_mean
from umtrain.evaluation.intervals import Z
from umtrain.evaluation.reasons import Section, without
from umtrain.evaluation.scores import (
    Floats,
    checked_scores,
    one_class_reason,
    pairs_in_order,
)


def paired_auc_test(labels: ArrayLike, probs_a: ArrayLike, probs_b: ArrayLike) -> Section:
    """Return by how much the AUC of A exceeds that of B on the same images, fit for JSON.

    `labels` (n,) are 0 or 1; `probs_a` and `probs_b` (n,) are two models' scores of each image.
    Keys: `auc_a`, `auc_b`, `difference` (A less B), `ci`, its 95% interval [low, high], `z`, and
    `p`, two-sided, of no difference. The test is that of DeLong, DeLong & Clarke-Pearson
    (Biometrics 1988; 44:837-845), by the fast algorithm of Sun & Xu (IEEE Signal Process Lett
    2014; 21:1389-1393); images count as independent. What cannot be had is None, with the reason
    in `<key>_reason`: all with one class; `ci`, `z` and `p` with one image in a class, or if the
    difference has no variance.

    Raises ValueError for arrays of other shapes or labels, UmtrainError if a score is not finite.
    """
    positive, values_a = checked_scores(labels, probs_a)
    _, values_b = checked_scores(labels, probs_b)
    reason = one_class_reason(positive)
    if reason is not None:
        return without(reason, "auc_a", "auc_b", "difference", "ci", "z", "p")
    n_pairs = int(positive.sum()) * int((~positive).sum())
    pairs_a, pairs_b = pairs_in_order(positive, values_a), pairs_in_order(positive, values_b)
    auc_a, auc_b = (float(of_positives.sum()) / n_pairs for of_positives, _ in (pairs_a, pairs_b))
    # Whole and half numbers: the difference of two models that order alike is exactly 0.
    ahead = tuple(of_a - of_b for of_a, of_b in zip(pairs_a, pairs_b, strict=True))
    difference = float(ahead[0].sum()) / n_pairs
    aucs: Section = {"auc_a": auc_a, "auc_b": auc_b, "difference": difference}
    return aucs | _delong_test(difference, ahead[0], ahead[1])


def paired_error_test(
    errors_a_mm: ArrayLike, errors_b_mm: ArrayLike, patients: ArrayLike | None = None
) -> Section:
    """Return by how much the absolute errors of A exceed those of B on the same images.

    `errors_a_mm` and `errors_b_mm` (n,) are two models' absolute errors of each image; `patients`
    (n,) names the patient of each, None makes each image a patient. Keys: `difference_mm`, the
    mean of A less B, below 0 if A is better; `ci_mm`, its 95% interval [low, high] by the
    bootstrap over patients (see `resample_counts`); `p`, two-sided, of Wilcoxon's signed-rank test
    (Biometrics Bull 1945; 1:80-83), in which images count as independent and equal errors are left
    out; `n`. What cannot be had is None, with the reason in `<key>_reason`.

    Raises ValueError for arrays of other shapes, or errors that are negative or not finite.
    """
    errors_a, errors_b = _checked_errors(errors_a_mm, errors_b_mm)
    ahead = errors_a - errors_b
    if ahead.size == 0:
        return without("the split has no images", "difference_mm", "ci_mm", "p") | {"n": 0}
    owners = np.arange(ahead.size) if patients is None else patients
    return {
        "difference_mm": float(ahead.mean()),
        **patient_interval("ci_mm", owners, weighted_mean(ahead)),
        **_signed_rank_test(ahead),
        "n": ahead.size,
    }


def _delong_test(difference: float, of_positives: Floats, of_negatives: Floats) -> Section:
    n_pos, n_neg = of_positives.size, of_negatives.size
    if min(n_pos, n_neg) < 2:
        reason = (
            f"a variance needs two images of each class; got {n_pos} positive, {n_neg} negative"
        )
        return without(reason, "ci", "z", "p")
    variance_pos = of_positives.var(ddof=1) / n_neg**2 / n_pos
    variance = float(variance_pos + of_negatives.var(ddof=1) / n_pos**2 / n_neg)
    if variance == 0:
        reason = "A differs from B alike for every image: the difference has no variance"
        return without(reason, "ci", "z", "p")
    error = variance**0.5
    z = difference / error
    interval = [max(-1.0, difference - Z * error), min(1.0, difference + Z * error)]
    return {"ci": interval, "z": z, "p": float(2 * norm.sf(abs(z)))}


def _signed_rank_test(ahead: Floats) -> Section:
    if not ahead.any():
        return without("the two models have the same error on every image", "p")
    return {"p": float(wilcoxon(ahead).pvalue)}


def _checked_errors(errors_a_mm: ArrayLike, errors_b_mm: ArrayLike) -> tuple[Floats, Floats]:
    errors_a, errors_b = np.asarray(errors_a_mm, dtype=float), np.asarray(errors_b_mm, dtype=float)
    if errors_a.ndim != 1 or errors_a.shape != errors_b.shape:
        raise ValueError(
            f"errors must be of one shape (n,); got {errors_a.shape} and {errors_b.shape}"
        )
    for errors in (errors_a, errors_b):
        if not (np.isfinite(errors) & (errors >= 0)).all():
            raise ValueError("errors must be absolute: finite and not below 0")
    return errors_a, errors_b
