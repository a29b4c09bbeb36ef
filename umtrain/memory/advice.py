"""What to try when device memory runs out."""

# By how much device memory a ResNet's step needs, most first; scripts/bench_memory.py smallest
# prints the figures behind the order.
_BY_NEED = ("vanilla", "checkpoint", "vdnn", "lms", "um", "um_group", "um_group_prefetch", "stream")


def strategies_needing_less(name: str) -> tuple[str, ...]:
    """Return the strategies that need less device memory than `name`, best first."""
    position = _BY_NEED.index(name) if name in _BY_NEED else 0
    return tuple(reversed(_BY_NEED[position + 1 :]))
