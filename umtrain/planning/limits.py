"""The largest size that fits, found with as few tries as bisection needs."""

from collections.abc import Callable

Fits = Callable[[int], bool]


def largest(fits: Fits, least: int, step: int, most: int) -> int | None:
    """Return the largest of least, least + step, … up to `most` for which `fits` says yes.

    None where not even the least fits. `fits` has to be monotone: what is smaller than what fits
    fits. It is asked about doubled sizes until one does not fit, and then halfway between.
    """
    if least > most or not fits(least):
        return None
    n_most = (most - least) // step
    below, reach = 0, 1
    while below < n_most:
        reach = min(reach, n_most)
        if not fits(least + reach * step):
            return least + _between(fits, least, step, below, reach) * step
        below, reach = reach, 2 * reach + least // step
    return least + below * step


def _between(fits: Fits, least: int, step: int, below: int, above: int) -> int:
    """Return the last index that fits, where `below` does and `above` does not."""
    while above - below > 1:
        middle = (below + above) // 2
        if fits(least + middle * step):
            below = middle
        else:
            above = middle
    return below
