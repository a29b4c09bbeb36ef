"""Train, val and test by patient, each class in its share of all three."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from umtrain.data.cells import SPLITS, Split
from umtrain.data.manifest import AnyRecord, Radiograph, Record

FRACTIONS: Mapping[Split, float] = {"train": 0.8, "val": 0.1, "test": 0.1}


def assign_splits(
    records: Sequence[Record], seed: int, fractions: Mapping[Split, float] = FRACTIONS
) -> list[Record]:
    """Return the records, in order, with splits of about `fractions` of each class.

    All images of a patient go to one split. A class of as many patients as there are splits, or
    more, is in every split. A patient with images of several classes counts for the rarest. The
    result depends on the seed and the set of patients, not on their order.
    """
    split_of_patient = _split_patients(records, seed, fractions)
    return [replace(record, split=split_of_patient[record.patient_id]) for record in records]


def _split_patients(
    records: Sequence[AnyRecord], seed: int, fractions: Mapping[Split, float]
) -> dict[str, Split]:
    patients: dict[str, list[AnyRecord]] = defaultdict(list)
    for record in records:
        patients[record.patient_id].append(record)
    split_of_patient: dict[str, Split] = {}
    for label, members in sorted(_strata(patients).items()):
        shuffled = _shuffled(members, [seed, *label.encode()])
        sizes = {patient: len(patients[patient]) for patient in shuffled}
        split_of_patient |= _fill(sizes, fractions)
    return split_of_patient


def _shuffled(patients: Sequence[str], seed: Sequence[int]) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(patients))
    return [patients[at] for at in order]


def _strata(patients: Mapping[str, Sequence[AnyRecord]]) -> dict[str, list[str]]:
    """Return the sorted patients of each class, a patient of several being of the rarest."""
    classes = {patient: {_label(r) for r in records} for patient, records in patients.items()}
    n_patients = Counter(label for labels in classes.values() for label in labels)
    strata: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(classes):
        strata[min(classes[patient], key=lambda label: (n_patients[label], label))].append(patient)
    return strata


def _label(record: AnyRecord) -> str:
    return "" if isinstance(record, Radiograph) else record.label


def _fill(sizes: Mapping[str, int], fractions: Mapping[Split, float]) -> dict[str, Split]:
    """Give each patient, in turn, to the split that lacks the largest part of its share."""
    shares = {
        split: fractions[split] * sum(sizes.values()) for split in SPLITS if fractions.get(split)
    }
    lacking = dict(shares)
    filled: dict[str, Split] = {}
    for patient, n_images in sizes.items():
        split = max(lacking, key=lambda name: lacking[name] / shares[name])
        filled[patient] = split
        lacking[split] -= n_images
    return filled
