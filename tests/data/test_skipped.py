"""What becomes of images that cannot be read: left out, named, counted; the rest is untouched."""

import importlib
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.augment import SlideAugment
from umtrain.data.dataset import RadiographDataset, SlideDataset
from umtrain.data.isolated import Limits
from umtrain.data.loader import make_loader
from umtrain.data.manifest import Slide, read_manifest
from umtrain.data.skipped import Skipped
from umtrain.errors import DataError

LABELS = {"0": 0, "1": 1}

# A dataset whose files do to their reader what a hostile file may do.
HOSTILE = """
import ctypes, os, signal
from umtrain.data.dataset import SlideDataset

class HostileDataset(SlideDataset):
    def __getitem__(self, key):
        name = self.records[key.position].path.name
        if name == "segv":
            ctypes.string_at(0)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "killed_once" and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)
"""


@pytest.fixture
def records(slides):
    return list(read_manifest(slides, "wsi").records)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    (tmp_path / "hostile_reader.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("hostile_reader")
    yield module.HostileDataset
    monkeypatch.delitem(importlib.sys.modules, "hostile_reader")


def renamed(record, folder, name):
    """The record of another file of that name, with the same content."""
    path = folder / name
    path.write_bytes(record.path.read_bytes())
    return Slide(record.id, record.patient_id, path, record.label, record.split, row=record.row)


def batches(dataset, skipped, epoch=0, workers=1, batch_size=2):
    loader = make_loader(
        dataset, batch_size, shuffle=True, seed=4, workers=workers, skipped=skipped
    )
    loader.set_epoch(epoch)
    return list(loader)


def images(found):
    return {
        name: image
        for batch in found
        if batch["id"]
        for name, image in zip(batch["id"], batch["image"], strict=True)
    }


@pytest.mark.fault("an image that its reader dies of", "that image is left out, no other")
@pytest.mark.parametrize("name", ["segv", "killed"])
def test_only_the_image_that_its_reader_dies_of_is_lost(records, hostile, tmp_path, name):
    augment = SlideAugment()
    whole = batches(SlideDataset(records, LABELS, 64, augment=augment), None, workers=0)
    bad = [renamed(records[0], tmp_path, name), *records[1:]]
    skipped = Skipped(bad)
    found = batches(hostile(bad, LABELS, 64, augment=augment), skipped, workers=2)
    (entry,) = skipped.entries
    assert (entry["id"], entry["row"], entry["split"]) == (bad[0].id, 2, "train")
    signal = {"segv": "SIGSEGV", "killed": "SIGKILL"}[name]
    assert entry["reason"] == f"{bad[0].path}: the reader failed: the process crashed ({signal})"
    # Every other image is in the batch where it would have been, and looks as it would have.
    assert [[i for i in b["id"] if i != bad[0].id] for b in whole] == [b["id"] for b in found]
    expected = images(whole)
    del expected[bad[0].id]
    assert expected.keys() == images(found).keys()
    assert all(torch.equal(image, expected[i]) for i, image in images(found).items())


def test_a_reader_killed_by_something_else_loses_nothing(records, hostile, tmp_path):
    once = [renamed(records[0], tmp_path, "killed_once"), *records[1:]]
    dataset = hostile(once, LABELS, 64)
    dataset.mark = str(tmp_path / "killed")
    skipped = Skipped(once)
    found = images(batches(dataset, skipped))
    assert not skipped.entries
    expected = images(batches(SlideDataset(records, LABELS, 64), None, workers=0))
    assert found.keys() == expected.keys()
    assert all(torch.equal(image, expected[i]) for i, image in found.items())


@pytest.mark.fault("an image that is never read to its end", "given up in time, left out")
def test_an_image_that_never_ends_is_given_up(radiographs, tmp_path):
    films = list(read_manifest(radiographs, "spine").records)
    os.mkfifo(tmp_path / "pipe.dcm")
    film = films[1]
    object.__setattr__(film, "path", tmp_path / "pipe.dcm")
    skipped = Skipped(films)
    loader = make_loader(
        RadiographDataset(films, 128),
        2,
        shuffle=False,
        workers=1,
        limits=Limits(5, 2**30),
        skipped=skipped,
    )
    assert [batch["id"] for batch in loader] == [
        [films[0].id],
        [films[2].id, films[3].id],
        [films[4].id, films[5].id],
    ]
    assert skipped.entries[0]["reason"].endswith("the reader failed: no answer within 5 s")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_an_image_keeps_its_place(records, tmp_path, workers):
    gone = [renamed(records[0], tmp_path, "gone"), *records[1:]]
    gone[0].path.unlink()
    skipped = Skipped(gone)
    dataset = SlideDataset(gone, LABELS, 64)
    loader = make_loader(dataset, 1, shuffle=False, workers=workers, skipped=skipped)
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        assert [batch["id"] for batch in loader] == [[], *([r.id] for r in gone[1:])]
    (entry,) = skipped.entries  # once, in the epoch that met it first
    assert entry["epoch"] == 1
    assert entry["reason"].startswith(f"{gone[0].path}: no such slide file")


def test_an_image_left_out_stays_out_even_if_its_file_comes_back(records, tmp_path):
    gone = [renamed(records[0], tmp_path, "gone"), *records[1:]]
    content = gone[0].path.read_bytes()
    gone[0].path.unlink()
    skipped = Skipped(gone)
    dataset = SlideDataset(gone, LABELS, 64)
    batches(dataset, skipped, workers=0)
    gone[0].path.write_bytes(content)
    again = Skipped(gone)
    again.restore(skipped.entries)
    assert gone[0].id not in images(batches(dataset, again, epoch=1, workers=0))
    assert again.entries == skipped.entries


def test_what_was_too_much_is_too_much_again_until_it_is_mended(records, tmp_path):
    gone = [renamed(r, tmp_path, f"gone{n}") for n, r in enumerate(records[:2])]
    content = gone[0].path.read_bytes()
    for record in gone:
        record.path.unlink()
    dataset = SlideDataset([*gone, *records[2:]], LABELS, 64)
    skipped = Skipped(dataset.records)
    for _ in range(2):  # what goes on has the entries that the state was saved with
        with pytest.raises(DataError, match=r"2 of 4 images of split train cannot be read"):
            batches(dataset, skipped, workers=0)
        entries, skipped = skipped.entries, Skipped(dataset.records)
        skipped.restore(entries)
        assert len(entries) == 1
    for record in gone:
        record.path.write_bytes(content)
    found = images(batches(dataset, skipped, workers=0))
    assert len(found) == len(records) - 1
    assert skipped.entries == entries


def slide(split, number):
    return Slide(f"s{number}", f"p{number}", "x.tif", "0", split, row=number + 2)


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from(["train", "val", "test"]))
def test_as_many_may_be_bad_as_the_share_says_and_one_always(n_rows, fraction, split):
    rows = [slide(split, number) for number in range(n_rows)]
    skipped = Skipped(rows, fraction)
    allowed = max(int(fraction * n_rows), 1 if fraction else 0)
    if split == "train":
        allowed = min(allowed, n_rows - 1)  # something must be left to train on
    for row in rows[:allowed]:
        skipped.add(row, 1, DataError("bad"))
    if allowed < n_rows:
        with pytest.raises(DataError, match=rf"{allowed + 1} of {n_rows} images of split {split}"):
            skipped.add(rows[allowed], 1, DataError("bad"))


def test_too_many_bad_images_are_listed_with_their_reasons():
    rows = [slide("train", number) for number in range(4)]
    skipped = Skipped(rows, 0.05)
    skipped.add(rows[0], 1, DataError("a.tif: cut short"))
    with pytest.raises(DataError) as caught:
        skipped.add(rows[2], 1, DataError("c.tif: empty"))
    text = str(caught.value)
    assert "2 of 4 images of split train cannot be read" in text
    assert "dataset.max_bad_fraction lets 1 be left out" in text
    assert "row 2, s0: a.tif: cut short\n  row 4, s2: c.tif: empty" in text


def test_what_other_processes_left_out_counts_once_and_may_be_too_much():
    records = [slide("train", number) for number in range(40)]
    mine, others = Skipped(records, 0.05), Skipped(records, 0.05)
    mine.add(records[0], 1, DataError("torn"))
    for number in (0, 1):
        others.add(records[number], 1, DataError("torn"))
    mine.merge(others.entries)
    mine.merge(others.entries)
    assert [entry["id"] for entry in mine.entries] == ["s0", "s1"]
    assert records[1] in mine
    late = Skipped(records, 0.05)
    late.add(records[2], 1, DataError("torn"))
    with pytest.raises(DataError, match="3 of 40 images of split train cannot be read"):
        mine.merge(late.entries)
    assert [entry["id"] for entry in mine.entries] == ["s0", "s1"]
