"""A threshold on probabilities: how to choose one, and what a classifier does at it."""

import numpy as np
from numpy.typing import ArrayLike

from umtrain.evaluation.intervals import share_with_interval
from umtrain.evaluation.reasons import Section
from umtrain.evaluation.scores import Bools, Floats, checked_probabilities, one_class_reason


def choose_threshold(labels: ArrayLike, probs: ArrayLike) -> float | None:
    """Return the probability from which on to call an image positive; None with one class.

    It has the largest Youden index, sensitivity + specificity - 1 (Cancer 1950; 3:32-35). Every
    threshold between two neighbouring probabilities has the same one, so it lies halfway between
    them, or between 0 and the lowest, where all are called positive. Of several such places it is
    the one nearest to the middle of their range; of two as near, the lower, which misses fewer
    positives.

    Raises ValueError and UmtrainError as `classification_metrics` does.
    """
    positive, values = checked_probabilities(labels, probs)
    if one_class_reason(positive) is not None:
        return None
    distinct = np.unique(values)
    candidates = (np.append(0.0, distinct[:-1]) + distinct) / 2
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    true, false = (_n_at_least(values[chosen], candidates) for chosen in (positive, ~positive))
    # The index times n_pos * n_neg: whole numbers, so that equal ones are equal.
    youden = true * n_neg - false * n_pos
    best = candidates[youden == youden.max()]
    return float(best[np.argmin(np.abs(best - (best[0] + best[-1]) / 2))])


def operating_point(positive: Bools, values: Floats, threshold: float) -> Section:
    """Return what calling `values` (n,) of at least `threshold` positive gets right, fit for JSON.

    Keys: `accuracy`, `sensitivity`, `specificity`, each with its `_ci`, Wilson's 95% interval, in
    which images count as independent; `confusion` {tp, fp, tn, fn}.
    """
    called = values >= threshold
    tp, fn = int((called & positive).sum()), int((~called & positive).sum())
    fp, tn = int((called & ~positive).sum()), int((~called & ~positive).sum())
    return {
        **share_with_interval("accuracy", tp + tn, positive.size, "images"),
        **share_with_interval("sensitivity", tp, tp + fn, "positive images"),
        **share_with_interval("specificity", tn, tn + fp, "negative images"),
        "confusion": {"tp": tp, "fp": fp, "tn": tn, "fn": fn},
    }


def _n_at_least(values: Floats, thresholds: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return values.size - np.searchsorted(np.sort(values), thresholds, side="left")
