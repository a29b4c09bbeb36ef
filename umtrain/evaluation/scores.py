"""Labels and scores of images: checked, and each score placed among those of the other class."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from umtrain.errors import UmtrainError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def checked_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[Bools, Floats]:
    """Return which images are positive, and their scores, (n,) each.

    Raises ValueError for arrays of other shapes or labels other than 0 and 1, and UmtrainError if
    a score is not finite.
    """
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


def checked_probabilities(labels: ArrayLike, probs: ArrayLike) -> tuple[Bools, Floats]:
    """Return the same as `checked_scores`; raises ValueError too for what is not in [0, 1]."""
    positive, values = checked_scores(labels, probs)
    if values.size and (values.min() < 0 or values.max() > 1):
        raise ValueError(f"probabilities must be in [0, 1]; got {values.min()} to {values.max()}")
    return positive, values


def one_class_reason(positive: Bools) -> str | None:
    """Return why there is no order of positives among negatives; None if both are there."""
    if positive.any() and not positive.all():
        return None
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    return f"AUC needs both classes; the split has {n_pos} positive and {n_neg} negative"


def pairs_in_order(positive: Bools, values: Floats) -> tuple[Floats, Floats]:
    """Return of each positive in how many pairs it lies above the negative, and the reverse.

    (n_pos,) and (n_neg,), whole and half numbers: a tie counts half. From midranks, in O(n log n)
    (Sun & Xu, IEEE Signal Process Lett 2014; 21:1389-1393): a value's rank among all, less its
    rank in its own class, is the number of values of the other class below it.
    """
    rank_in_all = rankdata(values)
    below_positive = rank_in_all[positive] - rankdata(values[positive])
    below_negative = rank_in_all[~positive] - rankdata(values[~positive])
    return below_positive, positive.sum() - below_negative
