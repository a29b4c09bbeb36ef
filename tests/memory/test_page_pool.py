"""The pool of pages: what is alive keeps its content, and no more than was alive is resident."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umtrain.compiler import cpp_compiler
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.linux import is_linux
from umtrain.memory.page_pool import PagePool, install_page_pool

MIB = 2**20
# Around the pool's bound, and sizes that fill no units.
SIZES = st.integers(2**10, 12 * MIB)

pytestmark = pytest.mark.skipif(
    not is_linux() or cpp_compiler() is None, reason="needs Linux and a C++ compiler (c++)"
)


@pytest.fixture(scope="module")
def pool() -> PagePool:
    recycle_large_buffers("cpu")
    found = install_page_pool()
    assert found is not None, "page_pool.cpp does not compile"
    return found


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return done.stdout


@given(st.lists(st.tuples(SIZES, st.booleans(), st.integers(0, 10**6)), min_size=1, max_size=40))
def test_buffers_keep_what_was_written_to_them(pool, steps):
    pool.give_back()  # what comes is made of what this test frees
    alive = []
    for number, (n_bytes, is_freeing, which) in enumerate(steps):
        buffer = torch.empty(n_bytes, dtype=torch.uint8).fill_(number)
        assert buffer.data_ptr() % 64 == 0
        alive.append((number, buffer))
        if is_freeing:
            del alive[which % len(alive)]
    for number, buffer in alive:
        assert (buffer == number).all()


@given(st.lists(st.tuples(SIZES, st.booleans(), st.integers(0, 10**6)), min_size=1, max_size=40))
def test_no_more_is_held_than_was_alive_at_most(pool, steps):
    pool.give_back()
    most_bytes, alive = pool.counts().alive, []
    for n_bytes, is_freeing, which in steps:
        alive.append(torch.empty(n_bytes, dtype=torch.uint8))
        counts = pool.counts()
        most_bytes = max(most_bytes, counts.alive)
        assert counts.alive + counts.free <= most_bytes
        if is_freeing:
            del alive[which % len(alive)]


RESIDENT = """
import random
import torch
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.linux import process_status, rss_bytes
from umtrain.memory.page_pool import install_page_pool

recycle_large_buffers("cpu")
draw, base, alive, most = random.Random(0), rss_bytes(), [], 0
for _ in range(600):
    alive.append(torch.ones(draw.choice([1, 2, 3, 5, 8, 13, 21, 34]) << 20, dtype=torch.uint8))
    while sum(buffer.nbytes for buffer in alive) > 200 << 20:
        del alive[draw.randrange(len(alive))]
    most = max(most, sum(buffer.nbytes for buffer in alive))
counts = install_page_pool().counts()
print((process_status()["VmHWM"] - base) / most, counts.fresh / most, counts.moved / most)
"""


def test_pages_of_freed_buffers_serve_buffers_of_other_sizes():
    held, fresh, moved = map(float, run(RESIDENT).split())
    assert held < 1.25  # with code that is loaded meanwhile
    assert fresh < 1.25  # of 35 times `most` that were taken
    assert moved > 1


FORKED = """
import os
import torch
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.page_pool import install_page_pool

recycle_large_buffers("cpu")
kept = torch.full((8 << 20,), 7, dtype=torch.uint8)
freed = torch.full((16 << 20,), 1, dtype=torch.uint8)
del freed
child = os.fork()
free = install_page_pool().counts().free >> 20
mine = torch.full((16 << 20,), 2 if child else 3, dtype=torch.uint8)
kept += 0 if child else 1
right = (mine == (2 if child else 3)).all() and (kept == (7 if child else 8)).all()
if not child:
    os._exit(0 if right and free == 0 else 1)
print(free, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bool(right))
"""


@pytest.mark.filterwarnings("ignore")
def test_a_forked_child_has_memory_of_its_own():
    assert run(FORKED, OMP_NUM_THREADS="1").split() == ["16", "0", "True"]


LIMITED = """
import resource
import torch
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.linux import data_bytes

recycle_large_buffers("cpu")
torch.ones(1 << 20).sum()
limit = data_bytes() + (100 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for size in (80, 3, 60, 2, 90):  # each fits alone, and only in what the one before had
    torch.ones(size << 20, dtype=torch.uint8)
    [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(40)]
try:
    torch.ones(120 << 20, dtype=torch.uint8)
except RuntimeError as error:
    from umtrain.memory.budget import is_out_of_memory
    print(is_out_of_memory(error), torch.ones(90 << 20, dtype=torch.uint8).numel() >> 20)
"""


def test_free_pages_are_never_in_the_way_of_a_limit():
    assert run(LIMITED, OMP_NUM_THREADS="1").split() == ["True", "90"]


GIVEN_BACK = """
import torch
from umtrain.memory.allocator import FreedBuffers, recycle_large_buffers, set_freed_buffers
from umtrain.memory.page_pool import install_page_pool

recycle_large_buffers("cpu")
pool = install_page_pool()
free = []
for choice in (FreedBuffers.GIVE_BACK, FreedBuffers.RECYCLE_STRIPS, FreedBuffers.RECYCLE):
    set_freed_buffers(choice)
    for mib in (128, 8):
        torch.empty(mib << 20, dtype=torch.uint8)
    free.append(pool.counts().free >> 20)
    pool.give_back()
    assert pool.counts().free == 0
print(*free)
"""


def test_what_is_kept_is_what_was_chosen():
    assert run(GIVEN_BACK).split() == ["0", "8", "128"]


UNCOMPILED = """
import logging
import torch
from umtrain.memory.allocator import recycle_large_buffers

logging.basicConfig(level=logging.INFO, format="%(message)s")
recycle_large_buffers("cpu")
recycle_large_buffers("cpu")
print(torch.ones(4 << 20).sum().item() == 4 << 20)
"""


def test_without_a_compiler_it_is_said_once_and_all_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", UNCOMPILED],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CXX": str(tmp_path / "no-compiler"), "UMTRAIN_CACHE": str(tmp_path)},
    )
    assert done.stdout.split() == ["True"]
    assert done.stderr.count("no page pool") == 1
    assert "Install a compiler of C++20" in done.stderr
