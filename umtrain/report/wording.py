"""Figures as people read them: a value with its interval, a count with its noun."""

from collections.abc import Sequence

NOTHING = "–"
_MINUS = "−"
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
_IMAGE_NAMES = {"wsi": "slide", "spine": "radiograph", "ct": "volume"}


def number(value: float | None, digits: int = 2) -> str:
    """Return `value` with `digits` decimals and a true minus sign; a dash for None."""
    if value is None:
        return NOTHING
    text = f"{value:.{digits}f}"
    if text.startswith("-"):
        # What rounds to zero has no sign.
        text = _MINUS + text[1:] if float(text) else text[1:]
    return text


def interval(bounds: Sequence[float] | None, digits: int = 2) -> str:
    """Return "0.78–0.95", or "−3.2 to 3.9" where a bound is negative; a dash for None."""
    if bounds is None:
        return NOTHING
    low, high = bounds
    between = " to " if low < 0 else "–"
    return f"{number(low, digits)}{between}{number(high, digits)}"


def estimate(value: float | None, bounds: Sequence[float] | None, digits: int = 2) -> str:
    """Return a value with its interval in brackets, without them if there is none."""
    if value is None or bounds is None:
        return number(value, digits)
    return f"{number(value, digits)} ({interval(bounds, digits)})"


def percent(share: float | None) -> str:
    """Return a share of 1 as a whole percentage; a dash for None."""
    return NOTHING if share is None else f"{100 * share:.0f}%"


def p_value(p: float | None) -> str:
    """Return "p = 0.03", "p < 0.001", or a dash for None."""
    if p is None:
        return NOTHING
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def images(dataset: str, n: int, kind: str = "") -> str:
    """Return a count of what `dataset` holds: "60 test slides", "1 radiograph"."""
    noun = _IMAGE_NAMES.get(dataset, "image")
    words = [str(n), kind, noun if n == 1 else f"{noun}s"]
    return " ".join(word for word in words if word)


def image_name(dataset: str) -> str:
    """Return what one image of `dataset` is called."""
    return _IMAGE_NAMES.get(dataset, "image")
