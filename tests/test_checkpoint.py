import os
import pickle
import resource
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umtrain.checkpoint import (
    DamagedError,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
    step_path,
    step_paths,
)
from umtrain.errors import Interrupted, OutOfMemoryError, RunError
from umtrain.files import remove_leftovers, write_atomic
from umtrain.memory.linux import data_bytes
from umtrain.signals import StopRequest

STATE = {
    "weights": torch.arange(48, dtype=torch.float32).reshape(1, 3, 4, 4),
    "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "values": {"lr": 0.1, 3: [True, None, "x"], "best": (0.5, -1.0)},
}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    channels_last = STATE["weights"].to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a.pt", {**STATE, "weights": channels_last, "n": np.float64(2)})
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded["weights"].equal(STATE["weights"])
    assert loaded["weights"].stride() == channels_last.stride()
    assert loaded["half"].view(torch.int16).equal(STATE["half"].view(torch.int16))
    assert loaded["scalar"].item() == 7
    assert (loaded["values"], loaded["n"]) == (STATE["values"], 2.0)


def _same(one, other):
    return all(
        value.equal(other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def test_no_flipped_bit_and_no_missing_end_goes_unnoticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    n_refused = 0
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        for content in (damaged, whole[:position]):
            path.write_bytes(content)
            try:
                # Names and padding of the container may change: what was saved may not.
                assert _same(STATE, load_checkpoint(path))
            except DamagedError:
                n_refused += 1
    assert n_refused > len(whole) / 7


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"sha256": Harm()}, tmp_path / "a.pt", pickle_module=pickle)
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def test_the_last_whole_checkpoint_is_used_and_damaged_ones_are_named(tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(step_path(tmp_path, step), {"step": step})
    step_path(tmp_path, 6).write_bytes(step_path(tmp_path, 6).read_bytes()[:100])
    said = []
    path, state = newest_checkpoint(tmp_path, said.append)
    assert (path.name, state) == ("step-00000004.pt", {"step": 4})
    assert len(said) == 1
    assert "step-00000006.pt: damaged" in said[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    step_path(tmp_path, 3).write_bytes(b"")
    for _ in range(2):  # not at the second try either
        with pytest.raises(RunError, match="every checkpoint is damaged; restore one"):
            newest_checkpoint(tmp_path, lambda text: None)


@pytest.mark.fault("a disk that does not give a checkpoint", "exit 2, the checkpoint is kept")
def test_a_checkpoint_that_the_disk_does_not_give_is_not_taken_for_damaged(tmp_path):
    save_checkpoint(step_path(tmp_path, 2), {"step": 2})
    step_path(tmp_path, 4).symlink_to("/proc/self/mem")  # its start fails as a bad disk's does
    text = r"step-00000004\.pt: cannot be read \(Input/output error\); it is kept"
    with pytest.raises(RunError, match=text):
        newest_checkpoint(tmp_path, print)
    assert step_paths(tmp_path) == [step_path(tmp_path, step) for step in (4, 2)]


@pytest.mark.fault("no memory to read a checkpoint", "exit 3, the checkpoint is kept")
def test_a_checkpoint_that_memory_is_short_for_is_not_taken_for_damaged(tmp_path):
    save_checkpoint(step_path(tmp_path, 2), {"x": torch.zeros(2**24)})
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 2**25, hard))
    try:
        # What earlier tests have freed is still this process's: it is taken, untouched.
        held = []
        with suppress(RuntimeError):
            while True:
                held.append(torch.empty(2**22))
        with pytest.raises(OutOfMemoryError, match=r"step-00000002\.pt: memory ran out as this"):
            newest_checkpoint(tmp_path, print)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert newest_checkpoint(tmp_path, print)[0] == step_path(tmp_path, 2)


def test_no_checkpoint_at_all_is_a_run_that_begins(tmp_path):
    assert newest_checkpoint(tmp_path, lambda text: None) is None


@given(
    st.lists(st.integers(1, 30), min_size=1, unique=True).map(sorted),
    st.sets(st.integers(1, 30)),
)
def test_the_last_two_and_the_best_of_each_are_kept(tmp_path_factory, steps, chosen):
    folder = tmp_path_factory.mktemp("checkpoints")
    best_steps = sorted(chosen & set(steps))
    for position, step in enumerate(steps):
        step_path(folder, step).touch()
        prune(folder, [best for best in best_steps if best <= step])
        left = {int(path.stem[5:]) for path in step_paths(folder)}
        assert set(steps[max(0, position - 1) : position + 1]) <= left
        for kept in steps[max(0, position - 1) : position + 1]:
            before = [best for best in best_steps if best <= kept]
            assert not before or before[-1] in left
        assert len(left) <= 4


def test_a_disk_that_is_full_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.pt"
    save_checkpoint(path, {"x": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(RunError, match=r"could not be written \(File too large\); earlier"):
            save_checkpoint(path, {"x": torch.ones(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path)["x"].equal(torch.zeros(10))


@pytest.fixture
def signal_in_write(monkeypatch):
    """Send SIGTERM to this process as torch writes the middle of a checkpoint."""

    class Stream:
        def __init__(self, stream):
            self.n, self.stream, self.flush = 0, stream, stream.flush

        def write(self, content):
            self.n += 1
            if self.n == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.stream.write(content)

    def write(path, fill):
        write_atomic(path, lambda stream: fill(Stream(stream)))

    monkeypatch.setattr("umtrain.checkpoint.write_atomic", write)


def test_a_signal_while_a_checkpoint_is_written_is_an_interruption(tmp_path, signal_in_write):
    with StopRequest(60), pytest.raises(Interrupted, match="by SIGTERM"):
        save_checkpoint(tmp_path / "a.pt", STATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [Interrupted("by SIGINT"), OSError("of before")])
def test_a_defect_is_not_mistaken_for_what_was_there_before_it(tmp_path, monkeypatch, before):
    def fail(path, fill):
        raise RuntimeError("a defect")

    monkeypatch.setattr("umtrain.checkpoint.write_atomic", fail)
    try:
        raise before
    except BaseException:
        with pytest.raises(RuntimeError, match="a defect"):
            save_checkpoint(tmp_path / "a.pt", STATE)


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path):
    kept = [".gitignore", ".lock", "a.pt", ".hidden.txt", ".a.toolongname.pt"]
    torn = [".step-00000004.ab12_xyz.pt", ".metrics.q1w2e3r4.json"]
    (tmp_path / "checkpoints").mkdir()
    for name in kept + torn:
        (tmp_path / "checkpoints" / name).touch()
    remove_leftovers(tmp_path)
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(left) == sorted(kept)
