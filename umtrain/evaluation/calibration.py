"""Whether probabilities mean what they say: Brier score and calibration bins."""

import numpy as np

from umtrain.evaluation.intervals import wilson_interval
from umtrain.evaluation.reasons import Section, without
from umtrain.evaluation.scores import Bools, Floats

_MAX_BINS = 10
_MIN_IMAGES_A_BIN = 5


def calibration_evidence(positive: Bools, probs: Floats) -> Section:
    """Return `brier` and `calibration` of `probs` (n,), fit for JSON; both None without images.

    The Brier score is the mean squared distance of a probability from what came true (Brier, Mon
    Weather Rev 1950; 78:1-3): 0 is best. Calibration is a list of bins {prob_mean,
    share_positive, ci, n}, `ci` Wilson's 95% interval of the share. Bins end at quantiles of the
    probabilities and hold about as many images each: at most 10 bins, of about 5 images or more.
    Equal probabilities share a bin.
    """
    if probs.size == 0:
        return without("the split has no images", "brier", "calibration")
    n_bins = min(_MAX_BINS, max(1, probs.size // _MIN_IMAGES_A_BIN))
    # The largest value of each bin; an interpolated quantile may split equal values by rounding.
    inner_edges = np.sort(probs)[(probs.size * np.arange(1, n_bins) - 1) // n_bins]
    bin_of_image = np.searchsorted(inner_edges, probs)
    members = (bin_of_image == number for number in np.unique(bin_of_image))
    return {
        "brier": float(np.mean((probs - positive) ** 2)),
        "calibration": [_bin(positive[chosen], probs[chosen]) for chosen in members],
    }


def _bin(positive: Bools, probs: Floats) -> Section:
    return {
        "prob_mean": float(probs.mean()),
        "share_positive": float(positive.mean()),
        "ci": wilson_interval(int(positive.sum()), positive.size),
        "n": positive.size,
    }
