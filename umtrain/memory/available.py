"""How much RAM this process may still take: of the machine, and of its memory cgroup.

A container's limit is a cgroup's; past it the kernel kills, it does not refuse.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")
# (hierarchy below /sys/fs/cgroup, limit, usage), cgroup v2 and v1.
_V2 = ("", "memory.max", "memory.current")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")


def available_bytes(root: Path = _ROOT) -> int:
    """Return the RAM that this process can still take without paging or being killed.

    `root` is where /proc and /sys are looked for. Of several ranks that torchrun has started on one
    machine each can take its part.
    """
    rooms = [room for room in map(_cgroup_room_bytes, _cgroups(root)) if room is not None]
    n_ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min([int(psutil.virtual_memory().available), *rooms]) // n_ranks_here


def _cgroups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the folder of each memory cgroup that this process is in, with its files' names."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy, limit, usage = _V1 if controllers else _V2
        mount = root / "sys/fs/cgroup" / hierarchy
        folder = mount / path.lstrip("/")
        for inside in (folder, *folder.parents):
            if inside.is_relative_to(mount):
                yield inside, limit, usage


def _cgroup_room_bytes(cgroup: tuple[Path, str, str]) -> int | None:
    """Return what a cgroup has left, its page cache counted as left; None without a limit."""
    folder, limit, usage = cgroup
    try:
        limit_text = (folder / limit).read_text().strip()
        used_bytes = int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit_text == "max":
        return None
    prefix = "total_" if "total_active_file" in counts else ""
    cache_bytes = sum(int(counts[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
    return max(0, int(limit_text) - used_bytes + cache_bytes)
