"""Sizes as people write them: bytes in code, GiB (2**30) in text."""

import re

from umtrain.errors import ConfigError

_FACTORS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


_MOST_BYTES = 2**60


def parse_bytes(text: str | int, key: str = "size") -> int:
    """Return the number of bytes that `text` ("2GiB", "500 MB", 1048576) stands for.

    Raises ConfigError, naming `key`, if it is no size or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{key}={text} is not a size; write for example {key}=2GiB or 512MiB")
    if float(match[1]) * factor > _MOST_BYTES:
        raise ConfigError(
            f"{key}={str(text)[:80]} is more than any machine has; write a smaller one"
        )
    n_bytes = int(float(match[1]) * factor)
    if n_bytes <= 0:
        raise ConfigError(f"{key}={text} must be more than 0 bytes")
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """Return `n_bytes` as text in the unit that keeps it short, for example "1.25 GiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes:.0f} B"
