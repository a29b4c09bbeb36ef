"""ROC and precision-recall curves, their areas, and what a bootstrap over patients says of both."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from umtrain.evaluation.bootstrap import percentile_interval, resample_counts
from umtrain.evaluation.intervals import TAILS
from umtrain.evaluation.reasons import Section, without
from umtrain.evaluation.scores import Bools, Floats

# Hundredths as divisions, not as multiples of 0.01: equal to every share that is a hundredth.
GRID: Floats = np.arange(101) / 100
_DIGITS = 6


class _Curves(NamedTuple):
    """Areas (resamples,) and curves on the grid (resamples, 101)."""

    auc: Floats
    average_precision: Floats
    sensitivity: Floats
    precision: Floats


def curve_evidence(positive: Bools, values: Floats, patients: ArrayLike) -> Section:
    """Return average precision, both curves and their bootstrap intervals, fit for JSON.

    `positive`, `values` and `patients` are (n,), with both classes present. Keys:
    `auc_ci_bootstrap`, `average_precision`, `average_precision_ci` and `curves`: `roc` {fpr, tpr,
    low, high} and `pr` {recall, precision, low, high, prevalence}, each on 101 hundredths. The ROC
    curve is the empirical one, at a jump its upper end. Precision at a recall is that of the
    highest threshold that reaches it, so that the area below is the average precision.

    Intervals, and `low` to `high` at each point, are 95% percentile intervals of the bootstrap over
    patients (see `resample_counts`); a resample with one class is drawn again. They are None if a
    class has a single patient, or if every resample has the same area.
    """
    ranking = _Ranking(positive, values)
    estimate = ranking.curves(np.ones((1, values.size)))
    reason = _too_few_patients(positive, np.asarray(patients))
    if reason is not None:
        auc_ci, roc_band = _unknown("auc_ci_bootstrap", reason)
        precision_ci, pr_band = _unknown("average_precision_ci", reason)
    else:
        found = ranking.resampled_curves(patients)
        auc_ci, roc_band = _known("auc_ci_bootstrap", found.auc, found.sensitivity)
        precision_ci, pr_band = _known(
            "average_precision_ci", found.average_precision, found.precision
        )
    roc = {"fpr": _listed(GRID), "tpr": _listed(estimate.sensitivity[0]), **roc_band}
    pr = {"recall": _listed(GRID), "precision": _listed(estimate.precision[0]), **pr_band}
    return {
        **auc_ci,
        "average_precision": float(estimate.average_precision[0]),
        **precision_ci,
        "curves": {"roc": roc, "pr": {**pr, "prevalence": float(positive.mean())}},
    }


class _Ranking:
    """Images from the highest score down, those of one score together."""

    def __init__(self, positive: Bools, values: Floats) -> None:
        self._positive = positive
        self._order = np.argsort(-values, kind="stable")
        self._starts = np.flatnonzero(np.diff(values[self._order], prepend=np.inf))

    def curves(self, counts: Floats) -> _Curves:
        """Return areas and curves of images that occur `counts` (resamples, n) times each."""
        true = self._n_down_to_each_score(counts * self._positive)
        false = self._n_down_to_each_score(counts * ~self._positive)
        n_pos, n_neg = true[:, -1:], false[:, -1:]
        new_true, new_false = (np.diff(n, axis=1, prepend=0) for n in (true, false))
        # Before the first image of a resample there is nothing to be precise about: 0 / 1.
        precision = true / np.maximum(true + false, 1)
        return _Curves(
            auc=(new_false * (true - new_true / 2)).sum(axis=1) / (n_pos * n_neg)[:, 0],
            average_precision=(new_true * precision).sum(axis=1) / n_pos[:, 0],
            sensitivity=_sensitivity_on_grid(false / n_neg, true / n_pos),
            precision=_precision_on_grid(true / n_pos, precision),
        )

    def resampled_curves(self, patients: ArrayLike) -> _Curves:
        """Return areas and curves of each resample of the patients."""
        blocks = [self.curves(counts) for counts in resample_counts(patients, self._two_classes)]
        return _Curves(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

    def _n_down_to_each_score(self, counts: Floats) -> Floats:
        n: Floats = np.add.reduceat(counts[:, self._order], self._starts, axis=1).cumsum(axis=1)
        return n

    def _two_classes(self, counts: Floats) -> Bools:
        n_pos = counts @ self._positive
        both: Bools = (n_pos > 0) & (n_pos < counts.sum(axis=1))
        return both


def _sensitivity_on_grid(fpr: Floats, tpr: Floats) -> Floats:
    origin = np.zeros((len(fpr), 1))
    lines = zip(np.hstack([origin, fpr]), np.hstack([origin, tpr]), strict=True)
    return np.array([np.interp(GRID, x, y) for x, y in lines])


def _precision_on_grid(recall: Floats, precision: Floats) -> Floats:
    # At recall 0 the curve has the value that it has just above.
    reached = np.maximum(GRID, np.finfo(float).tiny)
    lines = zip(recall, precision, strict=True)
    return np.array([y[np.searchsorted(x, reached)] for x, y in lines])


def _too_few_patients(positive: Bools, patients: ArrayLike) -> str | None:
    names = np.asarray(patients)
    n_pos, n_neg = (np.unique(names[chosen]).size for chosen in (positive, ~positive))
    if min(n_pos, n_neg) > 1:
        return None
    return (
        "a bootstrap over patients needs two patients with images of each class; the split has "
        f"{n_pos} with positive and {n_neg} with negative images"
    )


def _known(key: str, areas: Floats, curves: Floats) -> tuple[Section, Section]:
    """Return the interval of an area as `key`, and the band of its curve."""
    interval = percentile_interval(key, areas)
    if interval[key] is None:
        return _unknown(key, str(interval[f"{key}_reason"]))
    low, high = np.quantile(curves, TAILS, axis=0)
    return interval, {"low": _listed(low), "high": _listed(high)}


def _unknown(key: str, reason: str) -> tuple[Section, Section]:
    return without(reason, key), without(reason, "low", "high")


def _listed(curve: Floats) -> list[float]:
    listed: list[float] = np.round(curve, _DIGITS).tolist()
    return listed
