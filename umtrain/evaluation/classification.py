"""How well probabilities separate two classes: AUC with a 95% confidence interval, and the rest."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit
from scipy.stats import beta

from umtrain.evaluation.calibration import calibration_evidence
from umtrain.evaluation.curves import curve_evidence
from umtrain.evaluation.intervals import TAILS, Z
from umtrain.evaluation.operating_point import operating_point
from umtrain.evaluation.reasons import Section, without
from umtrain.evaluation.scores import (
    Bools,
    Floats,
    checked_probabilities,
    checked_scores,
    one_class_reason,
    pairs_in_order,
)


@dataclass(frozen=True)
class Auc:
    """An area under the ROC curve, its 95% confidence interval and how the interval was had."""

    auc: float
    ci: tuple[float, float]
    ci_method: str


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> Auc:
    """Return the area under the ROC curve of `scores`, with a 95% confidence interval.

    `labels` (n,) are 0 or 1, with both present; `scores` (n,) are higher where 1 is likelier; ties
    count half. The variance is that of DeLong, DeLong & Clarke-Pearson (Biometrics 1988;
    44:837-845), by the fast algorithm of Sun & Xu (IEEE Signal Process Lett 2014; 21:1389-1393).
    The interval is symmetric around the logit of the AUC, so that it never leaves (0, 1) (Pepe,
    "The Statistical Evaluation of Medical Tests for Classification and Prediction", 2003).

    That variance is 0 when the classes are perfectly separated or all scores are equal, and is not
    defined with a single image in a class. None of these means certainty. The interval is then
    that of Clopper & Pearson (Biometrika 1934; 26:404-413) for AUC·k successes in k trials, k
    being the size of the smaller class: k disjoint pairs of a positive and a negative image are
    independent, and each is in order with probability AUC. With k = 10 perfectly separated pairs
    it is [0.69, 1].

    Raises ValueError for arrays of other shapes or labels, or if a class is absent, and
    UmtrainError if a score is not finite.
    """
    positive, values = checked_scores(labels, scores)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if min(n_pos, n_neg) == 0:
        raise ValueError(f"AUC needs both classes; got {n_pos} positive and {n_neg} negative")
    of_positives, of_negatives = pairs_in_order(positive, values)
    placements_pos, placements_neg = of_positives / n_neg, of_negatives / n_pos
    auc = float(placements_pos.mean())
    if min(n_pos, n_neg) > 1:
        variance = placements_pos.var(ddof=1) / n_pos + placements_neg.var(ddof=1) / n_neg
        if variance > 0:
            return Auc(auc, _logit_interval(auc, float(np.sqrt(variance))), "delong")
    return Auc(auc, _clopper_pearson_interval(auc, min(n_pos, n_neg)), "clopper-pearson")


def classification_metrics(labels: ArrayLike, probs: ArrayLike, threshold: float = 0.5) -> Section:
    """Return AUC, its interval and the accuracy of `probs`, quickly, as a dict fit for JSON.

    `labels` (n,) are 0 or 1; `probs` (n,) are probabilities of class 1, which is predicted at
    `threshold` and above. Keys: `auc`, `auc_ci` [low, high], `auc_ci_method`, `accuracy`, `n_pos`,
    `n_neg`. What cannot be had is None, with the reason in `<key>_reason`.

    Raises ValueError for arrays of other shapes, labels or ranges, and UmtrainError if a
    probability is not finite.
    """
    positive, values = checked_probabilities(labels, probs)
    if positive.size:
        accuracy: Section = {"accuracy": float((positive == (values >= threshold)).mean())}
    else:
        accuracy = without("the split has no images", "accuracy")
    return {**_auc_metrics(positive, values), **accuracy, **_n_of_each_class(positive)}


def classification_evidence(
    labels: ArrayLike,
    probs: ArrayLike,
    patients: ArrayLike,
    threshold: float,
    threshold_from: str,
) -> Section:
    """Return all that a reader needs to judge the probabilities of a split, as a dict fit for JSON.

    `labels` and `probs` are as for `classification_metrics`, `patients` (n,) names the patient of
    each image, `threshold_from` says where the threshold comes from. Keys: `auc`, `auc_ci` and
    `auc_ci_method` as `roc_auc` has them; `auc_ci_bootstrap`, `average_precision`,
    `average_precision_ci` and `curves` (see `curve_evidence`); `accuracy`, `sensitivity` and
    `specificity`, each with its `_ci`, and `confusion` (see `operating_point`); `threshold`,
    `threshold_from`; `brier` and `calibration` (see `calibration_evidence`); `n_pos`, `n_neg`,
    `n_patients`. What cannot be had is None, with the reason in `<key>_reason`. Only the bootstrap
    knows of patients: in the other intervals images count as independent.

    Raises as `classification_metrics` does.
    """
    positive, values = checked_probabilities(labels, probs)
    owners = np.asarray(patients)
    if owners.shape != positive.shape:
        raise ValueError(
            f"expected a patient for each of {positive.size} images; got {owners.shape}"
        )
    return {
        **_discrimination(positive, values, owners),
        **operating_point(positive, values, threshold),
        "threshold": float(threshold),
        "threshold_from": threshold_from,
        **calibration_evidence(positive, values),
        **_n_of_each_class(positive),
        "n_patients": int(np.unique(owners).size),
    }


def _discrimination(positive: Bools, values: Floats, patients: ArrayLike) -> Section:
    section = _auc_metrics(positive, values)
    reason = one_class_reason(positive)
    if reason is None:
        return section | curve_evidence(positive, values, patients)
    keys = ("auc_ci_bootstrap", "average_precision", "average_precision_ci", "curves")
    return section | without(reason, *keys)


def _auc_metrics(positive: Bools, values: Floats) -> Section:
    reason = one_class_reason(positive)
    if reason is not None:
        return without(reason, "auc", "auc_ci", "auc_ci_method")
    result = roc_auc(positive, values)
    return {"auc": result.auc, "auc_ci": list(result.ci), "auc_ci_method": result.ci_method}


def _n_of_each_class(positive: Bools) -> Section:
    return {"n_pos": int(positive.sum()), "n_neg": int((~positive).sum())}


def _logit_interval(auc: float, standard_error: float) -> tuple[float, float]:
    half_width = Z * standard_error / (auc * (1 - auc))
    return float(expit(logit(auc) - half_width)), float(expit(logit(auc) + half_width))


def _clopper_pearson_interval(auc: float, n_trials: int) -> tuple[float, float]:
    # scipy.stats.binomtest has this interval for whole numbers of successes only.
    successes, failures = auc * n_trials, (1 - auc) * n_trials
    low = beta.ppf(TAILS[0], successes, failures + 1) if successes > 0 else 0.0
    high = beta.ppf(TAILS[1], successes + 1, failures) if failures > 0 else 1.0
    return float(low), float(high)
