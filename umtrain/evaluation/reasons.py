"""Figures that cannot be had: null in the record, with the reason beside them."""

Section = dict[str, object]


def without(reason: str, *keys: str) -> Section:
    """Return each of `keys` as None, and `reason` as its `<key>_reason`."""
    return {**dict.fromkeys(keys), **{f"{key}_reason": reason for key in keys}}
