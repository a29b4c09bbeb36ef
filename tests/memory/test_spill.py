"""The spill file: unnamed, reserved ahead, clear about what is wrong with its directory."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from umtrain import memory
from umtrain.errors import DeviceError, OutOfMemoryError
from umtrain.memory.layout import Layout
from umtrain.memory.spill import SpillFile

MIB = 2**20


def test_the_file_has_no_name_while_it_is_in_use(tmp_path):
    spill = SpillFile(tmp_path, reserve_bytes=MIB)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(spill.fd).st_blocks * 512 >= MIB
    spill.close()


def test_nothing_is_left_behind_by_a_process_that_is_killed(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from umtrain.memory.spill import SpillFile;"
        "spill = SpillFile(Path(sys.argv[1]), reserve_bytes=2**20);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DeviceError, match=r"memory.spill_dir=.*nowhere cannot hold the spill file"):
        SpillFile(tmp_path / "nowhere")


def test_a_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=r"Not a directory.*name an existing directory"):
        SpillFile(tmp_path / "file")


def test_a_filesystem_without_enough_room_is_known_before_training(tmp_path):
    free = os.statvfs(tmp_path)
    too_much = 2 * free.f_bavail * free.f_frsize + 2**30
    with pytest.raises(
        OutOfMemoryError, match=r"has not the room for saved tensors: .* are needed"
    ):
        SpillFile(tmp_path, reserve_bytes=too_much)


def test_a_disk_with_just_the_room_that_is_needed_is_used(tmp_path, in_own_mounts):
    program = (
        "import sys; from pathlib import Path; from umtrain.memory.spill import SpillFile;"
        "SpillFile(Path(sys.argv[1]), reserve_bytes=2**20).close()"
    )
    mount = f"mount -t tmpfs -o size=4m none {tmp_path}"
    done = in_own_mounts(mount, sys.executable, "-c", program, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def full_disk(monkeypatch):
    """Return a function that lets the spill files of a strategy meet a full disk from now on."""

    def fill():
        full = os.open("/dev/full", os.O_RDWR)
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, position: write(full, data, position))

    return fill


@pytest.mark.parametrize("strategy", ["vdnn", "lms", "um", "um_group", "um_group_prefetch"])
def test_a_disk_that_fills_up_in_mid_training_is_named(strategy, tmp_path, full_disk, room):
    room(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.Sigmoid())
    x = torch.randn(1, 1, 256, 256)
    under = memory.create(strategy, spill_dir=tmp_path)
    under.prepare(model, x)
    with under.step():
        model(x).sum().backward()
    full_disk()
    text = r"memory.spill_dir=.* could not be read or written \(No space left on device\); free"
    with pytest.raises(OutOfMemoryError, match=text), under.step():
        model(x).sum().backward()
    under.close()


@pytest.mark.parametrize("strategy", ["lms", "um", "vdnn"])
def test_a_host_budget_too_small_for_the_model_is_known_before_training(strategy, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.ReLU())
    under = memory.create(strategy, host_budget="1MiB", spill_dir=tmp_path)
    with pytest.raises(
        OutOfMemoryError, match=r"host memory ran out: .*memory.host_budget=1.00 MiB"
    ):
        under.prepare(model, torch.randn(1, 1, 256, 256))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int64", "bool", "complex64"])
def test_a_tensor_comes_back_as_it_was(name, tmp_path):
    dtype = getattr(torch, name)
    whole = torch.randn(4, 6, 10, 12).mul(100).to(dtype)
    spill = SpillFile(tmp_path)
    for tensor in (
        whole,
        whole.contiguous(memory_format=torch.channels_last),
        whole[1:3, ::2, :, 3:],
        whole.transpose(0, 3),
        whole[:1].expand(5, -1, -1, -1),
        whole[2, 3, 4, 5],
    ):
        layout = Layout.of(tensor)
        block = spill.take(layout.room_bytes)
        block.write(tensor, layout)
        room = torch.empty(block.n_bytes, dtype=torch.uint8)
        block.read_into(room)
        for copy in (layout.rebuild(block.as_bytes()), layout.rebuild(room)):
            assert torch.equal(copy, tensor)
            assert copy.stride() == tensor.stride()
            assert copy.dtype == tensor.dtype
            assert copy.data_ptr() % 64 == tensor.data_ptr() % 64
    spill.close()


def test_a_block_stays_taken_as_long_as_a_tensor_lies_on_it(tmp_path):
    spill = SpillFile(tmp_path)
    view = spill.take(MIB).as_bytes()[5:10]
    other = spill.take(MIB)
    assert other.offset != 0
    del view
    assert spill.take(MIB).offset == 0
    spill.close()
