"""What glibc's heap, where there is no pool of pages, keeps and what it gives back."""

import os
import subprocess
import sys

import pytest

# Buffers of 32 MiB, every other one freed: holes that nothing joins.
PROGRAM = """
import sys
import torch
from umtrain.memory.allocator import HeapHoles, recycle_large_buffers
from umtrain.memory.linux import rss_bytes

MIB = 2**20
recycle_large_buffers("cpu")
holes = HeapHoles(largest_bytes=int(sys.argv[1]) * MIB)
before = rss_bytes()
buffers = [torch.ones(32 * MIB, dtype=torch.uint8) for _ in range(12)]
del buffers[::2]
holes.limit()
print((rss_bytes() - before) // MIB)
"""


@pytest.mark.parametrize(
    ("largest_mib", "held_mib"),
    [
        (32, 6 * 32),  # 384 MiB are more than 2 holes of 32 MiB: what is free goes back
        (256, 12 * 32),  # less than 2 holes of 256 MiB: all stays for the next buffers
    ],
)
def test_free_pages_go_back_once_there_are_too_many(largest_mib, held_mib, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(largest_mib)]
    without_pool = {"CXX": str(tmp_path / "no-compiler"), "UMTRAIN_CACHE": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | without_pool
    )
    assert int(done.stdout) == pytest.approx(held_mib, abs=16)
