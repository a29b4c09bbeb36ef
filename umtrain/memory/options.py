"""What a user may choose about memory."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from umtrain.errors import ConfigError
from umtrain.units import parse_bytes

GROUPINGS = ("blocks", "equal")
VDNN_POLICIES = ("all", "conv")
_SIZES = {
    "device_budget": "device_budget_bytes",
    "host_budget": "host_budget_bytes",
    "group_bytes": "group_bytes",
}


@dataclass(frozen=True)
class Options:
    """What a user may choose about memory; sizes in bytes, None meaning no limit.

    `readers_bytes` is RAM that a run's reader processes will take: it is not free for a step.
    """

    device: str = "cpu"
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    spill_dir: Path | None = None
    grouping: str = "blocks"
    group_bytes: int | None = None
    prefetch_depth: int = 2
    policy: str = "all"
    cpu_layers: tuple[str, ...] = ()
    oversubscribe: bool = False
    trace: Path | None = None
    readers_bytes: int = 0

    @classmethod
    def parse(cls, **raw: Any) -> Self:
        """Build options from keyword arguments as people write them.

        `device_budget`, `host_budget` and `group_bytes` take bytes or text ("1.25GiB").
        Raises ConfigError for an unknown key or a value that is none.
        """
        for key, field_name in _SIZES.items():
            value = raw.pop(key, None)
            raw[field_name] = None if value is None else parse_bytes(value, f"memory.{key}")
        for key in ("spill_dir", "trace"):
            raw[key] = None if raw.get(key) is None else Path(raw[key])
        raw["cpu_layers"] = tuple(raw.get("cpu_layers") or ())
        known = {option.name for option in fields(cls)}
        if unknown := sorted(set(raw) - known):
            names = sorted(name.replace("_budget_bytes", "_budget") for name in known)
            raise ConfigError(
                f"memory has no option {', '.join(unknown)}; its options are {', '.join(names)}"
            )
        options = cls(**raw)
        options._check()
        return options

    def _check(self) -> None:
        _check_choice("device", self.device, ("cpu", "cuda"))
        _check_choice("memory.grouping", self.grouping, GROUPINGS)
        _check_choice("memory.policy", self.policy, VDNN_POLICIES)
        if self.oversubscribe and self.device == "cpu":
            raise ConfigError(
                "memory.oversubscribe=true is about a GPU's managed memory, and device=cpu; "
                "leave it out: without a GPU, memory.host_budget alone limits the spill file"
            )
        if self.prefetch_depth < 1:
            raise ConfigError(
                f"memory.prefetch_depth={self.prefetch_depth} must be at least 1 group; "
                "memory=um_group works without prefetching"
            )


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value} is not known; choose one of {', '.join(choices)}")
