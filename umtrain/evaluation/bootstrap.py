"""The percentile bootstrap over patients: all images of a patient come together."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from umtrain.evaluation.intervals import TAILS, all_equal
from umtrain.evaluation.reasons import Section, without

Floats = NDArray[np.float64]

N_RESAMPLES = 2000
_SEED = 0
# Counts held at once: a million images times resamples are 8 MB, and as much for each step.
_N_IN_BLOCK = 2**20

# Of a block of resamples, counts (resamples, n): can it be used; what is its figure; (resamples,).
Usable = Callable[[Floats], NDArray[np.bool_]]
Statistic = Callable[[Floats], Floats]


def resample_counts(patients: ArrayLike, usable: Usable | None = None) -> Iterator[Floats]:
    """Yield how often each image occurs in each of 2000 resamples, in blocks (resamples, n).

    `patients` (n,) names the patient of each image. A resample draws as many patients as there
    are, with replacement, and takes every image of each (Rutter, Acad Radiol 2000; 7:413-419).
    The seed is fixed. `usable` says which resamples of a block a figure can be had from; the
    others are drawn again until it can, so the figure is one of resamples that have it.
    """
    names, patient_of_image = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(_SEED)
    n_a_block = max(1, _N_IN_BLOCK // max(1, patient_of_image.size))
    for start in range(0, N_RESAMPLES, n_a_block):
        n_rows = min(n_a_block, N_RESAMPLES - start)
        counts = _draw(rng, n_rows, names.size)[:, patient_of_image]
        while usable is not None and not (kept := usable(counts)).all():
            counts[~kept] = _draw(rng, int((~kept).sum()), names.size)[:, patient_of_image]
        yield counts


def patient_interval(key: str, patients: ArrayLike, statistic: Statistic) -> Section:
    """Return `key` as the 95% interval of `statistic` by the bootstrap over patients, (n,).

    It is None if all images are of one patient.
    """
    if np.unique(np.asarray(patients)).size < 2:
        return without("images of one patient alone have no spread to resample", key)
    samples = [statistic(counts) for counts in resample_counts(patients)]
    return percentile_interval(key, np.concatenate(samples))


def percentile_interval(key: str, samples: Floats) -> Section:
    """Return `key` as the 95% percentile interval [low, high] of a figure's resamples, (m,).

    It is that of Efron & Tibshirani ("An Introduction to the Bootstrap", 1993, chapter 13). If
    every resample has the same value, as with perfectly separated classes, it is None.
    """
    if all_equal(samples):
        return without("every resample has the same value, which is no certainty", key)
    return {key: [float(bound) for bound in np.quantile(samples, TAILS)]}


def weighted_mean(values: Floats) -> Statistic:
    """Return the statistic that is the mean of `values` (n,) in each resample."""

    def statistic(counts: Floats) -> Floats:
        means: Floats = counts @ values / counts.sum(axis=1)
        return means

    return statistic


def weighted_median(values: Floats) -> Statistic:
    """Return the statistic that is the median of `values` (n,) in each resample."""
    order = np.argsort(values)
    ordered = values[order]

    def statistic(counts: Floats) -> Floats:
        n_up_to = counts[:, order].cumsum(axis=1)
        n_images = n_up_to[:, -1:]
        # Positions of the two middle values, the same one if their number is odd.
        lower = (n_up_to <= (n_images - 1) // 2).sum(axis=1)
        upper = (n_up_to <= n_images // 2).sum(axis=1)
        medians: Floats = (ordered[lower] + ordered[upper]) / 2
        return medians

    return statistic


def _draw(rng: np.random.Generator, n_rows: int, n_patients: int) -> Floats:
    drawn = rng.integers(n_patients, size=(n_rows, n_patients))
    cells = drawn + n_patients * np.arange(n_rows)[:, None]
    counts = np.bincount(cells.ravel(), minlength=n_rows * n_patients)
    return counts.reshape(n_rows, n_patients).astype(np.float64)
