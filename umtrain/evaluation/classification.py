"""How well probabilities separate two classes: AUC with a 95% confidence interval, accuracy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import beta, norm, rankdata

from umtrain.errors import UmtrainError

Floats = NDArray[np.float64]

_LEVEL = 0.95


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
    positive, values = _validated(labels, scores)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if min(n_pos, n_neg) == 0:
        raise ValueError(f"AUC needs both classes; got {n_pos} positive and {n_neg} negative")
    placements_pos, placements_neg = _placements(values[positive], values[~positive])
    auc = float(placements_pos.mean())
    if min(n_pos, n_neg) > 1:
        variance = placements_pos.var(ddof=1) / n_pos + placements_neg.var(ddof=1) / n_neg
        if variance > 0:
            return Auc(auc, _logit_interval(auc, float(np.sqrt(variance))), "delong")
    return Auc(auc, _clopper_pearson_interval(auc, min(n_pos, n_neg)), "clopper-pearson")


def classification_metrics(
    labels: ArrayLike, probs: ArrayLike, threshold: float = 0.5
) -> dict[str, object]:
    """Return AUC, its interval and the accuracy of `probs` as a dict fit for JSON.

    `labels` (n,) are 0 or 1; `probs` (n,) are probabilities of class 1, which is predicted at
    `threshold` and above. Keys: `auc`, `auc_ci` [low, high], `auc_ci_method`, `accuracy`, `n_pos`,
    `n_neg`. What cannot be had is None, with the reason in `auc_reason` or `accuracy_reason`.

    Raises ValueError for arrays of other shapes, labels or ranges, and UmtrainError if a
    probability is not finite.
    """
    positive, values = _validated(labels, probs)
    if values.size and (values.min() < 0 or values.max() > 1):
        raise ValueError(f"probabilities must be in [0, 1]; got {values.min()} to {values.max()}")
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    counts = {"n_pos": n_pos, "n_neg": n_neg}
    return {**_auc_metrics(positive, values), **_accuracy(positive, values >= threshold), **counts}


def _auc_metrics(positive: NDArray[np.bool_], values: Floats) -> dict[str, object]:
    if positive.all() or not positive.any():
        n_pos, n_neg = int(positive.sum()), int((~positive).sum())
        reason = f"AUC needs both classes; the split has {n_pos} positive and {n_neg} negative"
        return {"auc": None, "auc_ci": None, "auc_ci_method": None, "auc_reason": reason}
    result = roc_auc(positive, values)
    return {"auc": result.auc, "auc_ci": list(result.ci), "auc_ci_method": result.ci_method}


def _accuracy(positive: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, object]:
    if positive.size == 0:
        return {"accuracy": None, "accuracy_reason": "the split has no images"}
    return {"accuracy": float((positive == predicted).mean())}


def _validated(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    truth = np.asarray(labels)
    values = np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(
            f"labels and scores must be of one shape (n,); got {truth.shape} and {values.shape}"
        )
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1; got {np.unique(truth).tolist()}")
    n_bad = int((~np.isfinite(values)).sum())
    if n_bad:
        raise UmtrainError(
            f"{n_bad} of {values.size} predictions are not finite numbers: training diverged; "
            "lower the learning rate"
        )
    return truth.astype(bool), values


def _placements(positive: Floats, negative: Floats) -> tuple[Floats, Floats]:
    """Return for each positive the share of negatives below it, and the reverse; ties count half.

    From midranks, in O(n log n): a value's rank among all, less its rank in its own class, is the
    number of values of the other class below it.
    """
    n_pos, n_neg = len(positive), len(negative)
    rank_in_all = rankdata(np.concatenate([positive, negative]))
    below_positive = (rank_in_all[:n_pos] - rankdata(positive)) / n_neg
    below_negative = (rank_in_all[n_pos:] - rankdata(negative)) / n_pos
    return below_positive, 1 - below_negative


def _logit_interval(auc: float, standard_error: float) -> tuple[float, float]:
    half_width = norm.ppf((1 + _LEVEL) / 2) * standard_error / (auc * (1 - auc))
    return float(expit(logit(auc) - half_width)), float(expit(logit(auc) + half_width))


def _clopper_pearson_interval(auc: float, n_trials: int) -> tuple[float, float]:
    # scipy.stats.binomtest has this interval for whole numbers of successes only.
    successes, failures = auc * n_trials, (1 - auc) * n_trials
    tail = (1 - _LEVEL) / 2
    low = beta.ppf(tail, successes, failures + 1) if successes > 0 else 0.0
    high = beta.ppf(1 - tail, successes + 1, failures) if failures > 0 else 1.0
    return float(low), float(high)
