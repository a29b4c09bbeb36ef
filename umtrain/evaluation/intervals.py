"""What all confidence intervals share, their level above all, and those of shares."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from umtrain.evaluation.reasons import Section, without

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
Z = float(norm.ppf(TAILS[1]))


def all_equal(values: NDArray[np.float64]) -> bool:
    """Return whether `values` (n,), at least one, differ by rounding errors at most.

    An interval drawn from such values would have no width, which looks like certainty.
    """
    return bool(np.ptp(values) <= 1e-9 * np.abs(values).max())


def share_with_interval(key: str, n_successes: int, n_trials: int, of_what: str) -> Section:
    """Return `key`, a share of `n_trials`, and `<key>_ci`, its 95% interval [low, high].

    The interval is Wilson's (J Am Stat Assoc 1927; 22:209-212), in which trials are independent.
    Without trials both are None: the split has no `of_what`.
    """
    if n_trials == 0:
        return without(f"the split has no {of_what}", key, f"{key}_ci")
    interval = wilson_interval(n_successes, n_trials)
    return {key: n_successes / n_trials, f"{key}_ci": interval}


def wilson_interval(n_successes: int, n_trials: int) -> list[float]:
    """Return Wilson's 95% interval [low, high] of a share of at least one trial."""
    interval = binomtest(n_successes, n_trials).proportion_ci(LEVEL, method="wilson")
    return [float(interval.low), float(interval.high)]
