"""Volumes on the network's grid, as samples, as synthetic files."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from umtrain.data.check import check_manifest
from umtrain.data.ct import CtVolume, read_ct
from umtrain.data.dataset import SampleKey
from umtrain.data.digest import content_sha256
from umtrain.data.loader import make_loader
from umtrain.data.manifest import Volume, read_manifest
from umtrain.data.synthetic.thorax import MASS_DIAMETER_MM, make_thorax
from umtrain.data.synthetic.volumes import plan_volumes
from umtrain.data.volume_augment import VolumeAugment, shifted
from umtrain.data.volume_dataset import VolumeDataset
from umtrain.data.volume_grid import Grid, HounsfieldWindow, axis_weights, resample
from umtrain.errors import ManifestError

LUNG = HounsfieldWindow(-600, 1500)
LABELS = {"normal": 0, "mass": 1}


def volume_of(shape, spacing_mm=(1.0, 1.0, 1.0), hu=40):
    return CtVolume(np.full(shape, hu, np.int16), spacing_mm)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.1, 8))
def test_weights_are_shares_and_none_lies_outside(n_in, n_out, step):
    weights = axis_weights(n_in, n_out, step)
    assert weights.shape == (n_out, n_in)
    assert (weights >= 0).all()
    sums = weights.sum(axis=1)
    assert np.all((np.abs(sums - 1) < 1e-5) | (sums == 0))


@given(st.integers(2, 40))
def test_a_grid_of_the_volume_s_own_size_changes_nothing(n):
    np.testing.assert_array_equal(axis_weights(n, n, 1.0), np.eye(n, dtype=np.float32))


@given(st.integers(2, 30), st.integers(2, 30), st.integers(2, 30))
def test_what_is_the_same_everywhere_stays_so_on_any_grid(depth, rows, columns):
    resampled = resample(volume_of((9, 17, 23)), Grid(depth, rows, columns))
    np.testing.assert_allclose(resampled, 40, atol=1e-3)


def test_a_grid_with_a_spacing_is_centred_cut_and_padded_with_air():
    hu = np.full((10, 10, 10), -1024, np.int16)
    hu[4:6, 4:6, 4:6] = 1000  # a cube of 4 x 2 x 2 mm in the middle
    volume = CtVolume(hu, (2.0, 1.0, 1.0))
    fine = resample(volume, Grid(32, 4, 16, spacing_mm=1.0))
    assert (fine[:6] == -1024).all()  # 20 mm of the 32 were scanned
    assert fine[13:19, 1:3, 7:9].mean() > 0
    weight = (fine + 1024).sum()
    assert weight == pytest.approx(2024 * 4 * 2 * 2, rel=0.02)


def test_shrinking_averages_rather_than_skips():
    hu = np.zeros((8, 64, 64), np.int16)
    hu[:, ::2] = 100
    shrunk = resample(CtVolume(hu, (1, 1, 1)), Grid(4, 8, 8))
    np.testing.assert_allclose(shrunk[:, 1:-1], 50, atol=2)


def test_resampling_is_the_product_of_the_three_axes_weights():
    hu = np.random.default_rng(0).integers(-1000, 1500, (7, 20, 31)).astype(np.int16)
    weights = [axis_weights(n, m, n / m) for n, m in zip(hu.shape, (5, 33, 12), strict=True)]
    expected = np.einsum("az,by,cx,zyx->abc", *weights, hu.astype(np.float64), optimize=True)
    np.testing.assert_allclose(
        resample(CtVolume(hu, (1, 1, 1)), Grid(5, 33, 12)), expected, atol=1e-2
    )


def test_a_window_spans_the_grey_scale():
    grey = LUNG.grey(np.array([-3000, -1350, -600, 150, 3000], np.float32))
    assert grey.tolist() == [0, 0, 32768, 65535, 65535]


def dataset(volumes, split="train", **options):
    records = read_manifest(volumes, "ct").split(split)
    return VolumeDataset(records, LABELS, Grid(6, 16, 20), LUNG, **options)


def test_a_batch_of_volumes_lies_channels_last(volumes):
    batch = next(iter(make_loader(dataset(volumes), 2, shuffle=False)))
    assert batch["image"].movedim(1, -1).is_contiguous()
    assert batch["image"].shape == (2, 1, 6, 16, 20)
    assert batch["image"].dtype == torch.uint16
    assert [type(image) for image in batch["id"]] == [str, str]


def test_readers_in_processes_give_the_same_batches(volumes):
    alone, helped = (
        list(make_loader(dataset(volumes, augment=VolumeAugment()), 2, shuffle=True, workers=n))
        for n in (0, 1)
    )
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(alone, helped, strict=True))


def test_each_epoch_sees_a_volume_changed_in_its_own_way(volumes):
    images = dataset(volumes, augment=VolumeAugment())
    first, again, other = (images[SampleKey(epoch, 0)]["image"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_volume_s_own_window_wins(volumes):
    records = read_manifest(volumes, "ct").split("train")
    narrow = Volume(**{f: getattr(records[0], f) for f in Volume.__slots__} | {"window_width": 1.0})
    images = VolumeDataset([narrow], LABELS, Grid(6, 16, 20), LUNG)
    shares = images[SampleKey(0, 0)]["image"].float() / 65535
    assert ((shares == 0) | (shares == 1)).float().mean() > 0.9


@given(st.tuples(*[st.integers(-4, 4)] * 3))
def test_a_shift_brings_zeros_in_and_can_be_taken_back(shifts):
    grey = np.arange(1, 4 * 5 * 6 + 1, dtype=np.uint16).reshape(4, 5, 6)
    moved = shifted(grey, list(shifts))
    kept = [max(0, n - abs(s)) for n, s in zip(grey.shape, shifts, strict=True)]
    assert np.count_nonzero(moved) == np.prod(kept)
    back = shifted(moved, [-s for s in shifts])
    assert np.array_equal(back[back > 0], grey[back > 0])


# Synthetic volumes


def test_a_mass_is_where_it_is_said_to_be_and_solid():
    thorax = make_thorax((60, 120, 120), (4.0, 3.0, 3.0), 5, positive=True)
    assert thorax.mass is not None
    left, back, head = thorax.mass.center_mm
    middle = [(n - 1) / 2 for n in thorax.hu.shape]
    at = tuple(
        round(m + mm / s)
        for m, mm, s in zip(middle, (head, back, left), thorax.spacing_mm, strict=True)
    )
    assert abs(thorax.hu[at] - 40) < 100
    assert MASS_DIAMETER_MM[0] <= thorax.mass.diameter_mm <= MASS_DIAMETER_MM[1]
    without = make_thorax((60, 120, 120), (4.0, 3.0, 3.0), 5, positive=False)
    assert without.mass is None
    changed_mm3 = np.count_nonzero(np.abs(without.hu - thorax.hu) > 200) * np.prod([4.0, 3.0, 3.0])
    assert changed_mm3 < 1.4 * np.pi / 6 * thorax.mass.diameter_mm**3  # nothing else differs


def test_a_mass_lies_in_aerated_lung_not_in_the_heart():
    grid = ((48, 96, 96), (5.0, 3.8, 3.8))
    for seed in range(30):
        with_one, without = (make_thorax(*grid, seed, positive=p) for p in (True, False))
        changed_mm3 = np.count_nonzero(np.abs(with_one.hu - without.hu) > 200) * np.prod(grid[1])
        assert changed_mm3 > 0.6 * np.pi / 6 * with_one.mass.diameter_mm**3, seed


def test_brightness_does_not_give_the_label_away():
    grid = ((30, 60, 60), (8.0, 6.2, 6.2))
    drawn = [
        (label, make_thorax(*grid, 2 * seed + label, positive=bool(label)).hu)
        for seed in range(100)
        for label in (0, 1)
    ]
    labels = [label for label, _ in drawn]
    for figure in (np.mean, np.std, lambda hu: np.mean(hu > -300)):
        auc = roc_auc_score(labels, [figure(hu) for _, hu in drawn])
        assert 0.4 < auc < 0.6


def test_formats_say_nothing_about_labels_and_splits():
    specs = plan_volumes(400, 0)
    assert sum(spec.is_dicom for spec in specs) == 200
    for name in ("mass", "normal", "train", "test"):
        of_kind = [spec.is_dicom for spec in specs if name in (spec.label, spec.split)]
        assert 0.4 < np.mean(of_kind) < 0.6


def test_files_hold_what_was_drawn(volumes):
    specs = {spec.volume_id: spec for spec in plan_volumes(8, 0)}
    for record in read_manifest(volumes, "ct").records:
        thorax = specs[record.id].thorax(48)
        volume = read_ct(record.path)
        np.testing.assert_allclose(volume.hu, np.clip(thorax.hu, -1024, 3071), atol=0.51)
        np.testing.assert_allclose(volume.spacing_mm, thorax.spacing_mm, rtol=1e-5)


# Manifest and check


def rows_of(volumes):
    with volumes.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["path"] = str(volumes.parent / row["path"])
    return rows


def save(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_check_finds_what_is_wrong_with_volumes(volumes, tmp_path):
    rows = rows_of(volumes)
    series = next(row for row in rows if not row["path"].endswith(".gz"))
    series["sha256"] = "0" * 64
    rows[-1]["path"] = str(tmp_path / "gone")
    found = [
        problem.what for problem in check_manifest(save(tmp_path / "m.csv", rows), "ct").problems
    ]
    digest = content_sha256(read_manifest(volumes, "ct").records[rows.index(series)].path)
    assert f"sha256: got {digest} from the file, expected {'0' * 64}" in found
    assert "missing file" in found


def test_a_series_twice_is_found(volumes, tmp_path):
    rows = rows_of(volumes)
    rows[1]["path"] = rows[0]["path"]
    rows[1]["sha256"] = rows[0]["sha256"]
    found = check_manifest(save(tmp_path / "m.csv", rows), "ct").problems
    assert any("duplicate file" in problem.what for problem in found)


def test_a_window_without_width_is_refused(volumes, tmp_path):
    rows = [{**row, "window_width": "0"} for row in rows_of(volumes)]
    with pytest.raises(ManifestError, match="window_width: got '0', expected a number above 0"):
        read_manifest(save(tmp_path / "m.csv", rows), "ct")
