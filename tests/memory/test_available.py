"""What RAM is left: the machine's, or less in a container."""

import psutil
import pytest

from umtrain.memory.available import available_bytes

MIB = 2**20


def _write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def _v2(folder, limit, used_mib, cache_mib):
    stat = f"anon 5\nactive_file {cache_mib * MIB}\ninactive_file 0\n"
    _write(
        folder, memory__max=f"{limit}\n", memory__current=f"{used_mib * MIB}\n", memory__stat=stat
    )


@pytest.fixture
def root(tmp_path):
    """Return a root whose process is in the memory cgroup /a/b of version 2."""
    _write(tmp_path / "proc/self", cgroup="0::/a/b\n")
    return tmp_path


def test_a_cgroup_leaves_what_is_below_its_limit_and_its_page_cache(root):
    _v2(root / "sys/fs/cgroup/a/b", 100 * MIB, used_mib=60, cache_mib=20)
    assert available_bytes(root) == 60 * MIB


def test_the_tightest_cgroup_on_the_way_up_counts(root):
    _v2(root / "sys/fs/cgroup/a/b", 100 * MIB, used_mib=60, cache_mib=20)
    _v2(root / "sys/fs/cgroup/a", 50 * MIB, used_mib=45, cache_mib=0)
    assert available_bytes(root) == 5 * MIB


def test_a_cgroup_that_is_over_its_limit_leaves_nothing(root):
    _v2(root / "sys/fs/cgroup/a/b", 10 * MIB, used_mib=12, cache_mib=0)
    assert available_bytes(root) == 0


def test_a_cgroup_without_a_limit_leaves_what_the_machine_has(root):
    _v2(root / "sys/fs/cgroup/a/b", "max", used_mib=60, cache_mib=20)
    assert available_bytes(root) > psutil.virtual_memory().total / 100


def test_without_cgroups_it_is_what_the_machine_has(tmp_path):
    assert available_bytes(tmp_path) > psutil.virtual_memory().total / 100


def test_version_1_counts_the_page_cache_of_child_cgroups_too(tmp_path):
    _write(tmp_path / "proc/self", cgroup="9:cpu:/x\n4:memory:/box\n0::/\n")
    stat = f"active_file 0\ntotal_active_file {8 * MIB}\ntotal_inactive_file {2 * MIB}\n"
    _write(
        tmp_path / "sys/fs/cgroup/memory/box",
        memory__limit_in_bytes=f"{64 * MIB}\n",
        memory__usage_in_bytes=f"{50 * MIB}\n",
        memory__stat=stat,
    )
    assert available_bytes(tmp_path) == 24 * MIB


def test_ranks_on_one_machine_share_what_it_has(root, monkeypatch):
    _v2(root / "sys/fs/cgroup/a", 100 * MIB, used_mib=60, cache_mib=20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(root) == 15 * MIB
