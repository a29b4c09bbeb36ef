import csv
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from umtrain.data.synthetic.slide_render import SlideRenderer
from umtrain.data.synthetic.slide_scene import build_scene
from umtrain.data.synthetic.slides import COLUMNS, SlideSpec, make_slides, plan_slides, write_slide
from umtrain.data.synthetic.tissue import sprite_bank, stroma_texture
from umtrain.data.wsi import read_slide, slide_info

SIZE_PX = 1024


def _spec(label: str, seed: int = 3) -> SlideSpec:
    return SlideSpec("slide", "patient", label, "train", seed)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The negative and the positive slide of one seed: pixels, and mask at the slide's size."""
    folder = tmp_path_factory.mktemp("pair")
    slides = {}
    for label in ("0", "1"):
        path, mask_path = folder / f"{label}.tif", folder / f"{label}.png"
        write_slide(_spec(label), path, SIZE_PX, mask_path)
        with Image.open(mask_path) as mask:
            pixels = np.asarray(mask.resize((SIZE_PX, SIZE_PX), Image.Resampling.NEAREST))
        slides[label] = read_slide(path, SIZE_PX)[0].astype(float), pixels
    return slides


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slides(tmp_path_factory.mktemp("made"), n=6, size=512, seed=1, processes=2)


@given(n=st.integers(6, 300), seed=st.integers(0, 2**31))
def test_every_split_has_both_classes_and_patients_stay_in_one(n: int, seed: int) -> None:
    specs = plan_slides(n, seed)
    labels, splits = defaultdict(list), defaultdict(set)
    for spec in specs:
        labels[spec.split].append(spec.label)
        splits[spec.patient_id].add(spec.split)
    assert len({spec.slide_id for spec in specs}) == n
    assert set(labels) == {"train", "val", "test"}
    assert all(abs(of.count("1") - of.count("0")) <= 1 for of in labels.values())
    assert all(len(of) == 1 for of in splits.values())


@given(n=st.integers(0, 5))
def test_few_slides_go_to_training_first(n: int) -> None:
    splits = [spec.split for spec in plan_slides(n, 0)]
    assert len(splits) == n
    assert splits.count("train") >= min(n, 2)


def test_splits_are_about_65_10_25_percent_and_some_patients_have_two_slides() -> None:
    specs = plan_slides(200, 0)
    splits = [spec.split for spec in specs]
    assert (splits.count("train"), splits.count("val"), splits.count("test")) == (130, 20, 50)
    n_patients = len({spec.patient_id for spec in specs})
    assert 130 < n_patients < 190


def test_seeds_differ_between_slides_and_between_sets() -> None:
    seeds = [spec.seed for set_seed in (0, 1) for spec in plan_slides(50, set_seed)]
    assert len(set(seeds)) == 100


def test_openslide_sees_a_pyramid_at_one_micron_per_pixel(made: Path) -> None:
    info = slide_info(made.parent / "slides" / "slide_0000.tif")
    assert (info.width_px, info.height_px) == (512, 512)
    assert info.level_downsamples == (1.0, 2.0)
    assert info.mpp == pytest.approx(1.0)


def test_pyramid_levels_show_the_same_picture(made: Path) -> None:
    with tifffile.TiffFile(made.parent / "slides" / "slide_0000.tif") as tiff:
        full, half = (page.asarray() for page in tiff.pages)
    reduced = np.asarray(Image.fromarray(full).reduce(2)).astype(int)
    in_place = np.abs(reduced - half).mean()
    off_by_one = np.abs(np.roll(reduced, 1, axis=1) - half).mean()
    assert in_place < 0.6 * off_by_one


@pytest.mark.parametrize("size", [300, 515])
def test_sides_need_not_be_whole_tiles(tmp_path: Path, size: int) -> None:
    write_slide(_spec("1"), tmp_path / "slide.tif", size, tmp_path / "mask.png")
    image, _ = read_slide(tmp_path / "slide.tif", size)
    drawn = SlideRenderer(build_scene(size, 3, positive=True), 3).strip(0, size)
    assert np.abs(image.astype(int) - drawn).mean() < 5


def test_manifest_names_every_file_with_its_checksum(made: Path) -> None:
    with made.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["slide_id"] for row in rows] == [f"slide_{index:04d}" for index in range(6)]
    for row in rows:
        content = (made.parent / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert (made.parent / row["mask"]).is_file()
        assert row["mpp"] == "1"


def test_same_seed_same_bytes_whatever_the_processes(made: Path, tmp_path: Path) -> None:
    again = make_slides(tmp_path, n=6, size=512, seed=1, processes=1)
    assert again.read_bytes() == made.read_bytes()


def test_threads_do_not_change_a_slide(tmp_path: Path) -> None:
    write_slide(_spec("1"), tmp_path / "one.tif", 1100, None, threads=1)
    write_slide(_spec("1"), tmp_path / "two.tif", 1100, None, threads=2)
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()


def test_progress_counts_to_the_number_of_slides(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    make_slides(tmp_path, n=2, size=256, seed=0, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_a_failed_write_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "slide.tif").mkdir()
    with pytest.raises(IsADirectoryError):
        write_slide(_spec("0"), tmp_path / "slide.tif", 256, None)
    assert [path.name for path in tmp_path.iterdir()] == ["slide.tif"]


def test_strips_do_not_change_what_is_drawn() -> None:
    renderer = SlideRenderer(build_scene(600, 4, positive=True), 4)
    whole = renderer.strip(0, 600)
    parts = [renderer.strip(first, min(first + 77, 600)) for first in range(0, 600, 77)]
    assert (np.concatenate(parts) == whole).all()


def test_only_positive_slides_have_cancer_in_the_mask(
    pair: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    assert set(np.unique(pair["0"][1])) == {0, 1}
    assert set(np.unique(pair["1"][1])) == {0, 1, 2}


def test_the_classes_differ_only_where_the_mask_says_cancer(
    pair: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    difference = np.abs(pair["1"][0] - pair["0"][0]).max(axis=2)
    cancer = pair["1"][1] == 2
    assert difference[cancer].mean() > 10
    assert np.percentile(difference[~ndimage.binary_dilation(cancer, iterations=24)], 99) < 4


def test_dark_blobs_tell_the_classes_apart_at_half_the_size_but_not_at_an_eighth(
    pair: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    def darkest_blob(label: str, downsample: int) -> float:
        """How dark 3×3 pixels can be throughout, where the positive slide has its nests."""
        image = Image.fromarray(pair[label][0].astype(np.uint8)).reduce(downsample)
        blobs = ndimage.maximum_filter(np.asarray(image)[..., 0], 3)
        nests = pair["1"][1][::downsample, ::downsample] == 2
        return float(np.percentile(blobs[nests], 2))

    def difference(downsample: int) -> float:
        return abs(darkest_blob("0", downsample) - darkest_blob("1", downsample))

    assert difference(2) > 35
    assert difference(4) < 12
    assert difference(8) < 12


def test_nests_are_no_darker_on_average_than_what_stands_for_them(
    pair: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    nests = pair["1"][1] == 2
    means = [pair[label][0][nests].mean() for label in ("0", "1")]
    assert means[0] == pytest.approx(means[1], abs=3)


def test_average_colour_and_stamps_do_not_depend_on_the_label() -> None:
    for seed in range(4):
        scenes = [build_scene(SIZE_PX, seed, positive) for positive in (False, True)]
        places = [
            [
                (stamp.y + len(stamp.sprite.opacity) // 2, stamp.x + len(stamp.sprite.opacity) // 2)
                for stamp in scene.stamps
            ]
            for scene in scenes
        ]
        assert len(places[0]) == len(places[1])
        off = np.abs(np.array(sorted(places[0])) - np.array(sorted(places[1])))
        assert off.max(axis=1).mean() < 30
        means = [SlideRenderer(scene, seed).strip(0, SIZE_PX).mean((0, 1)) for scene in scenes]
        assert np.abs(means[0] - means[1]).max() < 0.5


def test_clumps_match_nuclei_in_darkness_but_not_in_size() -> None:
    bank = sprite_bank()
    ratio = np.mean([clump.absorbed for clump in bank.clump]) / np.mean(
        [nucleus.absorbed for nucleus in bank.tumour]
    )
    assert ratio == pytest.approx(1, abs=0.05)
    cell, nucleus = (
        np.mean([(sprite.opacity > 127).sum() for sprite in kind])
        for kind in (bank.lymphocyte, bank.tumour)
    )
    assert nucleus > 5 * cell


def test_tissue_is_pink_nuclei_are_blue_and_glass_is_bright() -> None:
    scene = build_scene(SIZE_PX, 0, positive=False)
    image = SlideRenderer(scene, 0).strip(0, SIZE_PX).astype(int)
    tissue = np.kron(scene.density > 0.9, np.ones((16, 16), bool))
    red, green, blue = np.median(image[tissue], axis=0)
    assert red > green + 25
    assert blue > green
    assert np.median(image[np.kron(scene.density == 0, np.ones((16, 16), bool))]) > 225
    dark = image[image.sum(axis=2) < 300]
    assert np.median(dark[:, 2]) > np.median(dark[:, 0])


def test_stroma_repeats_without_a_seam() -> None:
    texture = stroma_texture().astype(int)
    inside = np.abs(np.diff(texture, axis=0)).mean()
    across = np.abs(texture[0] - texture[-1]).mean()
    assert across == pytest.approx(inside, rel=0.35)
