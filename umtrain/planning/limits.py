"""The largest size that fits, found in few tries.

Memory grows almost evenly with an image's pixels and with the images of a batch, so how full it
was in two tries says about where it is full; halving makes up for where that is wrong.
"""

import math
from collections.abc import Callable, Collection, Sequence

Fits = Callable[[int], bool]
# Of the largest size that fits, and the smallest that does not, None if none is known: what to try.
Guess = Callable[[int, int | None], int | None]

# In pixels or images: from the least size to the second that is tried; what a line that is nearly
# level says at most; and what is tried in its place.
_FIRST_FACTOR, _LEVEL_FACTOR, _NEXT_FACTOR = 256, 256, 4
_N_SLOW = 2
_NEAR = 0.05
_ROUNDING = 1e-9


def largest(
    fits: Fits, least: int, step: int, most: int, guess: Guess = lambda below, above: None
) -> int | None:
    """Return the largest of least, least + step, … up to `most` for which `fits` says yes.

    None where not even the least fits. `fits` has to be monotone: what is smaller than what fits
    fits. Where `guess` has no answer it is asked about doubled sizes until one does not fit, and
    then halfway between.
    """
    if least > most or not fits(least):
        return None
    n_most = (most - least) // step
    below, above = 0, n_most + 1
    while above - below > 1:
        is_open = above > n_most
        guessed = guess(least + below * step, None if is_open else least + above * step)
        if guessed is not None:
            tried = (guessed - least) // step
        else:
            tried = 2 * below + least // step if is_open else (below + above) // 2
        tried = min(max(tried, below + 1), above - 1)
        if fits(least + tried * step):
            below = tried
        else:
            above = tried
    return least + below * step


class Secant:
    """Guesses where memory is full from how full it was.

    Sizes count by their `power`: 2 for the sides of an image, 1 for images. A size that is in
    `known`, of which much was found out already, is guessed in the place of one close by. The
    `first` guess is far from the least size where none is given.
    """

    def __init__(self, power: int, known: Collection[int] = (), first: int | None = None) -> None:
        self._power, self._known, self._first = power, known, first
        self._shares: dict[int, Sequence[float]] = {}
        self._width, self._n_slow = math.inf, 0

    def note(self, size: int, shares: Sequence[float]) -> None:
        """Take note of how full each memory was at a size: 1 is full, NaN is not known."""
        self._shares[size] = shares

    def __call__(self, below: int, above: int | None) -> int | None:
        """Return a guess, None where that would be no better than halving."""
        guess = None if self._is_slow(below, above) else self._guess(below, above)
        return None if guess is None else self._known_near(guess, below, above)

    def _is_slow(self, below: int, above: int | None) -> bool:
        """Return whether guesses have left more than half of what was open, again and again."""
        if above is None:
            return False
        width, self._n_slow = above - below, self._n_slow + 1
        if width <= self._width / 2:
            self._width, self._n_slow = width, 0
        if self._n_slow <= _N_SLOW:
            return False
        self._n_slow = 0
        return True

    def _guess(self, below: int, above: int | None) -> int | None:
        sizes = sorted(self._shares)
        smaller = [size for size in sizes if size <= below][-2:]
        larger = [size for size in sizes if above is not None and size >= above][:2]
        if above is None and len(smaller) == 1:
            is_ahead = self._first is not None and self._first > below
            return self._first if is_ahead else int(self._times(_FIRST_FACTOR, below))
        full = [self._full_at(smaller, larger, number) for number in range(self._n_memories)]
        size = min(full, default=math.inf)
        if above is None and size > self._times(_LEVEL_FACTOR, below):
            size = self._times(_NEXT_FACTOR, below)
        if size >= (math.inf if above is None else above):
            return None
        return int(size * (1 + _ROUNDING))

    @property
    def _n_memories(self) -> int:
        return min(map(len, self._shares.values()), default=0)

    def _full_at(self, smaller: Sequence[int], larger: Sequence[int], number: int) -> float:
        """Return the size at which a memory is full.

        Memory that fills only once another is full grows along a line with a bend: two tries on
        one side of the limit say more than one on each, if what they say is between those.
        """
        beyond = [
            self._on_line(pair[0], pair[1], number) for pair in (smaller, larger) if len(pair) == 2
        ]
        if not smaller or not larger:
            return min(beyond, default=math.inf)
        between = [size for size in beyond if smaller[-1] <= size <= larger[0]]
        return min(between, default=self._on_line(smaller[-1], larger[0], number))

    def _on_line(self, first: int, second: int, number: int) -> float:
        """Return the size at which a memory is full, on the line through two tries."""
        start, end = self._extent(first), self._extent(second)
        share, share_there = self._shares[first][number], self._shares[second][number]
        slope = (share_there - share) / (end - start)
        if not slope > 0:
            return math.inf
        return self._size(max(0.0, start + (1 - share) / slope))

    def _known_near(self, size: int, below: int, above: int | None) -> int:
        """Return the nearest size that is known, if it is close and still open."""
        near = [
            known
            for known in self._known
            if below < known < (above or math.inf) and abs(known - size) <= _NEAR * size
        ]
        return min(near, key=lambda known: abs(known - size), default=size)

    def _times(self, factor: int, size: int) -> float:
        return self._size(factor * self._extent(size))

    def _extent(self, size: int) -> float:
        return float(size**self._power)

    def _size(self, extent: float) -> float:
        return float(extent ** (1 / self._power))
