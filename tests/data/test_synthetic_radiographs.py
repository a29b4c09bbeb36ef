import csv
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from umtrain.data.radiograph import pixel_spacing_mm, read_radiograph
from umtrain.data.synthetic.radiograph_implants import IMPLANTS
from umtrain.data.synthetic.radiographs import (
    RadiographSpec,
    make_radiographs,
    plan_radiographs,
    write_radiograph,
)

_SIZE_PX = 320


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_radiographs(tmp_path_factory.mktemp("spine"), 12, _SIZE_PX, seed=3)


def _rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def _sva_mm(spec: RadiographSpec, size_px: int = 4000) -> float:
    scene = spec.scene(size_px)
    (c7_x, _), (s1_x, _) = scene.keypoints_px()
    sign = 1 if spec.facing == "right" else -1
    return sign * (c7_x - s1_x) * scene.mm_per_px


def test_every_row_of_the_manifest_matches_its_file(made: Path) -> None:
    rows = _rows(made)
    assert len(rows) == 12
    specs = plan_radiographs(12, seed=3)
    for row, spec in zip(rows, specs, strict=True):
        path = made.parent / row["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        image = read_radiograph(path)
        stated_mm = float(row["mm_per_px"]) if row["mm_per_px"] else None
        scene = spec.scene(_SIZE_PX)
        assert image.pixels.shape == scene.shape
        assert pixel_spacing_mm(image, stated_mm, path) == pytest.approx([scene.mm_per_px] * 2)
        for x, y in (("c7_x", "c7_y"), ("s1_x", "s1_y")):
            assert 0 < float(row[x]) < image.pixels.shape[1] - 1
            assert 0 < float(row[y]) < image.pixels.shape[0] - 1


def test_the_spacing_stands_in_the_manifest_only_where_the_file_has_none(made: Path) -> None:
    for row in _rows(made):
        image = read_radiograph(made.parent / row["path"])
        assert (row["mm_per_px"] != "") == (image.spacing_mm is None)


def test_the_same_seed_gives_the_same_bytes_in_other_processes(made: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    again = make_radiographs(
        tmp_path, 12, _SIZE_PX, seed=3, progress=lambda i, n: done.append((i, n)), processes=2
    )
    assert again.read_bytes() == made.read_bytes()  # with the hash of every image in it
    assert done == [(i, 12) for i in range(1, 13)]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert files == {row["path"] for row in _rows(again)} | {"manifest.csv"}


def test_another_seed_gives_other_patients() -> None:
    one, other = plan_radiographs(6, seed=0), plan_radiographs(6, seed=1)
    assert {spec.patient_seed for spec in one}.isdisjoint(spec.patient_seed for spec in other)
    assert {spec.pose_seed for spec in one}.isdisjoint(spec.pose_seed for spec in other)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 300), seed=st.integers(0, 2**31))
def test_every_split_has_images_and_no_patient_is_in_two(n: int, seed: int) -> None:
    specs = plan_radiographs(n, seed)
    assert len({spec.image_id for spec in specs}) == len(specs) == n
    splits_of_patient: dict[str, set[str]] = {}
    for spec in specs:
        splits_of_patient.setdefault(spec.patient_id, set()).add(spec.split)
    assert all(len(splits) == 1 for splits in splits_of_patient.values())
    counts = Counter(next(iter(splits)) for splits in splits_of_patient.values())
    held_out = max(1, round(0.1 * len(splits_of_patient)))
    assert counts["val"] == counts["test"] == held_out
    assert counts["train"] == len(splits_of_patient) - 2 * held_out > 0


def test_one_image_is_for_training_and_a_second_for_testing() -> None:
    assert [spec.split for spec in plan_radiographs(1, 0)] == ["train"]
    assert sorted(spec.split for spec in plan_radiographs(2, 0)) == ["test", "train"]


def test_a_set_has_the_variety_of_a_department() -> None:
    specs = plan_radiographs(40, seed=0)
    assert Counter(spec.facing for spec in specs) == {"left": 20, "right": 20}
    assert Counter(spec.photometric for spec in specs)["MONOCHROME1"] == 10
    assert Counter(spec.spacing for spec in specs) == {"pixel": 28, "imager": 8, "none": 4}
    assert sum(spec.implant is not None for spec in specs) == 5
    assert {spec.bits_stored for spec in specs} == {12, 14}
    assert len({spec.patient_id for spec in specs}) < 40


def test_sva_spans_the_clinical_range_and_no_more() -> None:
    sva_mm = [_sva_mm(spec) for spec in plan_radiographs(150, seed=0)]
    assert -61 < min(sva_mm) < -20
    assert 80 < max(sva_mm) < 121
    assert 0 < np.median(sva_mm) < 45


def test_sva_in_mm_does_not_depend_on_the_resolution() -> None:
    for spec in plan_radiographs(10, seed=0):
        assert _sva_mm(spec, 256) == pytest.approx(_sva_mm(spec, 4000), abs=0.01)


def test_where_a_keypoint_lies_cannot_be_guessed_from_the_frame() -> None:
    specs = plan_radiographs(60, seed=0)
    c7_mm, s1_mm = [], []
    for spec in specs:
        scene = spec.scene(4000)
        c7, s1 = (np.array(point) * scene.mm_per_px for point in scene.keypoints_px())
        c7_mm.append(c7)
        s1_mm.append(s1)
    assert (np.std(c7_mm, axis=0) > 12).all()
    assert (np.std(s1_mm, axis=0) > 12).all()


def test_the_size_is_the_least_number_of_rows() -> None:
    for spec in plan_radiographs(20, seed=0):
        rows, columns = spec.scene(4000).shape
        assert 4000 <= rows <= 4160
        assert 0.46 < columns / rows < 0.55
        assert 0.12 < spec.scene(4000).mm_per_px < 0.24


def _mean_at(pixels: np.ndarray, at_px: tuple[float, float], radius_px: float) -> float:
    rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    return float(pixels[np.hypot(columns - at_px[0], rows - at_px[1]) < radius_px].mean())


def test_the_pixels_show_bone_where_the_keypoints_say(tmp_path: Path) -> None:
    # Averaged over films of both facings and photometric interpretations: anything else
    # in the picture (ribs, shoulders, noise) is as often beside a keypoint as on it.
    size_px = 800
    c7_steps, s1_steps = [], []
    specs = [spec for spec in plan_radiographs(16, seed=1) if spec.implant is None]
    assert len({(spec.facing, spec.photometric) for spec in specs}) == 4
    for spec in specs:
        write_radiograph(spec, tmp_path / "film.dcm", size_px)
        pixels = read_radiograph(tmp_path / "film.dcm").pixels / 65535
        scene = spec.scene(size_px)
        canvas, anatomy = scene.canvas(), scene.anatomy
        c7 = anatomy.vertebra("C7")
        gap_mm = c7.height_mm / 2 + 2.5 * anatomy.scale
        body, above, below = (
            _mean_at(pixels, canvas.to_px(c7.point(0, up_mm)), 1.5 / scene.mm_per_px)
            for up_mm in (0, gap_mm, -gap_mm)
        )
        c7_steps.append(body - (above + below) / 2)
        x_mm, y_mm = anatomy.s1_corner_mm
        slope = anatomy.sacral_slope
        toward = np.array([np.cos(slope) - np.sin(slope), np.sin(slope) + np.cos(slope)])
        in_sacrum, outside = (
            _mean_at(
                pixels,
                canvas.to_px((x_mm + step_mm * toward[0], y_mm + step_mm * toward[1])),
                1.5 / scene.mm_per_px,
            )
            for step_mm in (3.0, -3.0)
        )
        s1_steps.append(in_sacrum - outside)
    assert min(c7_steps) > 0
    assert np.mean(s1_steps) > 0.04


def test_a_patient_facing_left_is_the_mirror_of_one_facing_right() -> None:
    spec = plan_radiographs(1, seed=0)[0]
    left, right = (replace(spec, facing=facing).scene(500) for facing in ("left", "right"))
    last = right.shape[1] - 1
    for (x_left, y_left), (x_right, y_right) in zip(
        left.keypoints_px(), right.keypoints_px(), strict=True
    ):
        assert x_left == pytest.approx(last - x_right)
        assert y_left == y_right
    assert _sva_mm(replace(spec, facing="left")) == pytest.approx(
        _sva_mm(replace(spec, facing="right"))
    )


@pytest.mark.parametrize("implant", sorted(IMPLANTS))
def test_an_implant_saturates_part_of_the_film(tmp_path: Path, implant: str) -> None:
    spec = plan_radiographs(3, seed=0)[0]
    bright = {}
    for kind in (None, implant):
        path = tmp_path / "film.dcm"
        write_radiograph(replace(spec, implant=kind), path, 400)
        bright[kind] = (read_radiograph(path).pixels > 65000).mean()
    assert bright[implant] > bright[None] + 2e-4


def test_the_file_says_what_it_is_and_holds_no_date(tmp_path: Path) -> None:
    specs = plan_radiographs(8, seed=0)
    for facing in ("left", "right"):
        spec = next(spec for spec in specs if spec.facing == facing)
        write_radiograph(spec, tmp_path / "film.dcm", 200)
        file = dcmread(tmp_path / "film.dcm")
        assert list(file.PatientOrientation) == [{"left": "P", "right": "A"}[facing], "F"]
        assert file.BitsStored == spec.bits_stored
        assert file.pixel_array.max() < 2**spec.bits_stored
        assert file.Modality == "DX"
        assert file.PatientName == f"SYNTHETIC^{spec.patient_id}"
        assert all(not element.value for element in file if element.VR in ("DA", "TM", "DT"))


def test_no_two_films_share_an_identifier(tmp_path: Path) -> None:
    specs = plan_radiographs(2, seed=0) + plan_radiographs(2, seed=1)
    identifiers = set()
    for spec in specs:
        write_radiograph(spec, tmp_path / "film.dcm", 128)
        identifiers.add(dcmread(tmp_path / "film.dcm", stop_before_pixels=True).SOPInstanceUID)
    assert len(identifiers) == 4


@pytest.mark.parametrize(("n", "size_px"), [(0, 400), (3, 16)])
def test_too_few_or_too_small_images_are_refused(tmp_path: Path, n: int, size_px: int) -> None:
    with pytest.raises(ValueError, match="expected n of at least 1 and size_px of at least 64"):
        make_radiographs(tmp_path, n, size_px)
    assert list(tmp_path.iterdir()) == []
