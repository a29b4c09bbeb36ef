from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.manifest import Radiograph, Slide
from umtrain.data.splits import assign_splits

FILE = Path("/a.svs")


@st.composite
def cohorts(draw):
    """Slides of patients who each have one to three slides of one class."""
    patients = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), max_size=60))
    return [
        Slide(f"s{patient}.{i}", f"p{patient}", FILE, label, "train")
        for patient, (label, n) in enumerate(patients)
        for i in range(n)
    ]


def splits_by(records, key):
    found = defaultdict(set)
    for record in records:
        found[key(record)].add(record.split)
    return found


@given(cohorts(), st.integers(0, 2**32))
def test_no_patient_is_in_two_splits(slides, seed):
    by_patient = splits_by(assign_splits(slides, seed), lambda slide: slide.patient_id)
    assert all(len(splits) == 1 for splits in by_patient.values())


@given(cohorts(), st.integers(0, 2**32))
def test_every_class_of_three_patients_is_in_every_split(slides, seed):
    n_patients = Counter(label for label, _ in {(s.label, s.patient_id) for s in slides})
    by_label = splits_by(assign_splits(slides, seed), lambda slide: slide.label)
    for label, n in n_patients.items():
        assert len(by_label[label]) == min(n, 3)


@given(cohorts(), st.integers(0, 2**32), st.randoms())
def test_splits_depend_on_the_seed_and_not_on_the_order(slides, seed, random):
    shuffled = random.sample(slides, len(slides))
    given_order = {slide.id: slide.split for slide in assign_splits(slides, seed)}
    other_order = {slide.id: slide.split for slide in assign_splits(shuffled, seed)}
    assert given_order == other_order


@given(cohorts(), st.integers(0, 2**32))
def test_each_class_is_shared_out_to_within_a_patient(slides, seed):
    assigned = assign_splits(slides, seed, {"train": 0.5, "val": 0.25, "test": 0.25})
    n_slides = Counter(slide.label for slide in slides)
    n_in = Counter((slide.label, slide.split) for slide in assigned)
    for label, n in n_slides.items():
        for split, share in (("train", 0.5), ("val", 0.25), ("test", 0.25)):
            assert n_in[label, split] == pytest.approx(share * n, abs=3 * 2)


def test_another_seed_gives_other_splits():
    slides = [Slide(f"s{i}", f"p{i}", FILE, "a", "train") for i in range(50)]
    assert assign_splits(slides, 0) != assign_splits(slides, 1)


def test_a_share_of_nothing_leaves_its_split_empty():
    slides = [Slide(f"s{i}", f"p{i}", FILE, "a", "train") for i in range(50)]
    assigned = assign_splits(slides, 0, {"train": 0.9, "val": 0.1})
    assert Counter(slide.split for slide in assigned) == {"train": 45, "val": 5}


def test_a_patient_of_two_classes_counts_for_the_rarer():
    common = [Slide(f"c{i}", f"p{i}", FILE, "common", "train") for i in range(30)]
    rare = [Slide(f"r{i}", f"p{i}", FILE, "rare", "train") for i in range(3)]
    by_label = splits_by(assign_splits(common + rare, 0), lambda slide: slide.label)
    assert by_label["rare"] == {"train", "val", "test"}


def test_radiographs_are_shared_out_by_patient():
    films = [Radiograph(f"i{i}", f"p{i // 2}", FILE, 1, 2, 3, 4, "train") for i in range(100)]
    assigned = assign_splits(films, 0)
    assert Counter(film.split for film in assigned) == {"train": 80, "val": 10, "test": 10}
