from collections import Counter

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from umtrain.data.augment import SlideAugment
from umtrain.data.dataset import SampleKey
from umtrain.data.manifest import Slide, read_manifest
from umtrain.data.masks import BACKGROUND, SlideMask, read_mask
from umtrain.data.patches import (
    GridDataset,
    PatchDataset,
    PatchGrid,
    PatchReader,
    draw_patch,
    plan_grid,
    plan_slide,
)
from umtrain.data.synthetic.slides import make_slides
from umtrain.data.wsi import SlideFrame, SlideInfo, read_slide, slide_info
from umtrain.errors import DataError

SIDES = st.integers(3, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two slides of 512 px with masks, one of each label."""
    folder = tmp_path_factory.mktemp("patches")
    make_slides(folder, 2, 512, 4)
    return folder


@pytest.fixture(scope="module")
def slides(folder):
    return read_manifest(folder / "manifest.csv", "wsi").records


def _reader(slide, res, mpp=None):
    return PatchReader(slide, res, mpp, openslide.OpenSlideCache(2**20))


@settings(max_examples=100)
@given(st.integers(1, 400), st.integers(1, 400), st.floats(3, 120))
def test_the_grid_covers_the_slide_and_no_cell_lies_outside(width, height, l0_side):
    grid = plan_grid(SlideInfo(width, height, (1.0,), None, "test"), l0_side)
    assert grid.n_columns * l0_side >= width - 1e-3
    assert grid.n_rows * l0_side >= height - 1e-3
    x, y = grid.frame.to_l0(grid.n_columns - 1, grid.n_rows - 1)
    assert x < width
    assert y < height


@settings(max_examples=100)
@given(
    npst.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))),
    st.floats(0.5, 20),
    st.floats(-30, 10),
    st.floats(2, 25),
)
def test_a_cell_counts_if_and_only_if_tissue_reaches_into_it(tissue, scale, l0_x, l0_side):
    frame = SlideFrame(l0_x, 0.0, scale)
    grid = PatchGrid(l0_side, 9, 14)
    cells = grid.cells(tissue, frame)
    deepest = np.full(cells.shape, -np.inf)  # how far tissue reaches into a cell, on its worse axis
    for row, column in np.argwhere(tissue):
        (left, top), (right, bottom) = frame.to_l0(column, row), frame.to_l0(column + 1, row + 1)
        for r, c in np.ndindex(cells.shape):
            across = min((c + 1) * l0_side - left, right - c * l0_side)
            down = min((r + 1) * l0_side - top, bottom - r * l0_side)
            deepest[r, c] = max(deepest[r, c], min(across, down))
    # Where borders coincide, rounding may go either way; such cells have no tissue's inside.
    assert cells[deepest > 1e-6].all()
    assert not cells[deepest < -1e-6].any()
    for row, column in np.argwhere(tissue):
        x, y = frame.to_l0(column + 0.5, row + 0.5)
        at = int(y // l0_side), int(x // l0_side)
        if 0 <= at[0] < grid.n_rows and 0 <= at[1] < grid.n_columns:
            assert cells[at]


@settings(max_examples=60)
@given(st.integers(0, 200), st.integers(0, 200), st.floats(1, 3000))
def test_a_cells_place_on_the_slide_is_its_corner_and_leads_back(row, column, l0_side):
    grid = PatchGrid(l0_side, 201, 201)
    l0_x, l0_y = grid.frame.to_l0(column, row)
    assert grid.corner(row, column) == (pytest.approx(l0_x, abs=0.5), pytest.approx(l0_y, abs=0.5))
    assert grid.frame.to_out(l0_x, l0_y) == (pytest.approx(column), pytest.approx(row))


@settings(max_examples=100)
@given(
    npst.arrays(
        np.uint8, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=st.integers(0, 2)
    ),
    st.integers(1, 8),
    SIDES,
    st.integers(0, 99),
    st.data(),
)
def test_a_drawn_patch_has_the_label_of_its_pixels_and_lies_on_the_slide(
    classes, downsample, l0_side, seed, data
):
    mask = SlideMask(classes, downsample)
    height, width = (n * downsample for n in classes.shape)
    info = SlideInfo(width, height, (1.0,), None, "test")
    wanted = data.draw(st.sampled_from(mask.present))
    patch = draw_patch(mask, info, l0_side, wanted, np.random.default_rng(seed))
    assert patch.label == mask.patch_class(patch.l0_x, patch.l0_y, l0_side)
    for start, side_px in ((patch.l0_x, width), (patch.l0_y, height)):
        assert 0 <= start <= max(side_px - l0_side, 0)
    assert patch == draw_patch(mask, info, l0_side, wanted, np.random.default_rng(seed))


def test_a_patch_at_level_0_has_the_slides_own_pixels(slides):
    stored = tifffile.imread(slides[0].path, key=0)
    patch = _reader(slides[0], 100).read(201, 150)
    assert np.abs(patch.astype(int) - stored[150:250, 201:301]).max() <= 3  # two JPEG decoders


def test_a_patch_beyond_the_slide_is_white(slides):
    patch = _reader(slides[0], 64).read(480, 480)
    assert patch.shape == (64, 64, 3)
    assert (patch[32:] == 255).all()
    assert (patch[:, 32:] == 255).all()
    assert (patch[:32, :32] != 255).any()


@pytest.mark.parametrize("mpp", [0.7, 1.6, 2.0, 3.0])
def test_a_patch_at_another_mpp_is_that_part_of_the_slide(slides, mpp):
    res = 64
    reader = _reader(slides[0], res, mpp)
    assert reader.l0_side == pytest.approx(res * mpp)  # the slide has 1 micron per pixel
    patch = reader.read(120, 90)
    whole, _ = read_slide(slides[0].path, 512)
    box = (120, 90, 120 + reader.l0_side, 90 + reader.l0_side)
    expected = Image.fromarray(whole).resize((res, res), Image.Resampling.BILINEAR, box=box)
    assert np.abs(patch.astype(int) - np.asarray(expected)).mean() < 5


def test_an_mpp_needs_the_slides_own(tmp_path):
    image = np.full((64, 64, 3), 200, np.uint8)
    tifffile.imwrite(
        tmp_path / "s.tif", image, tile=(64, 64), photometric="rgb", compression="jpeg"
    )
    slide = Slide("s", "p", tmp_path / "s.tif", "0", "train")
    assert _reader(slide, 32).l0_side == 32
    with pytest.raises(DataError, match=r"dataset.mpp=0.5 needs .* manifest's mpp column"):
        _reader(slide, 32, 0.5)


def test_patches_depend_on_seed_epoch_and_place_alone(slides):
    def sample(seed, epoch, position):
        dataset = PatchDataset(slides, 64, per_slide=6, augment=SlideAugment(), seed=seed)
        return dataset[SampleKey(epoch, position)]

    first, again = sample(1, 2, 3), sample(1, 2, 3)
    assert first["image"].equal(again["image"])
    assert first["label"] == again["label"]
    for other in (sample(2, 2, 3), sample(1, 3, 3), sample(1, 2, 4)):
        assert not first["image"].equal(other["image"])


def test_the_classes_that_a_slide_has_are_drawn_equally_often(slides):
    per_slide = 12
    dataset = PatchDataset(slides, 64, per_slide=per_slide)
    assert len(dataset) == 2 * per_slide
    for at, slide in enumerate(slides):
        mask = read_mask(slide.mask, slide_info(slide.path))
        positions = range(at * per_slide, (at + 1) * per_slide)
        samples = [dataset[SampleKey(epoch, i)] for epoch in range(2) for i in positions]
        counts = Counter(sample["label"] for sample in samples)
        assert {sample["id"] for sample in samples} == {slide.id}
        assert set(counts) == set(mask.present)
        expected = 2 * per_slide / len(mask.present)
        assert all(abs(n - expected) <= 2 for n in counts.values()), counts


def test_a_slide_without_a_mask_says_so_when_it_is_drawn_from(slides):
    slide = slides[0]
    bare = Slide(slide.slide_id, slide.patient_id, slide.path, slide.label, slide.split)
    with pytest.raises(DataError, match="the manifest names no mask of it"):
        PatchDataset([bare], 64, per_slide=1)[SampleKey(0, 0)]


@pytest.mark.parametrize(("res", "mpp"), [(64, None), (50, None), (40, 2.0)])
def test_every_cell_is_looked_at_that_a_mask_would_not_call_background(slides, res, mpp):
    for slide in slides:
        plan = plan_slide(slide, res, mpp)
        mask = read_mask(slide.mask, slide_info(slide.path))
        looked_at = set(map(tuple, plan.cells.tolist()))
        for row, column in np.ndindex(plan.grid.n_rows, plan.grid.n_columns):
            at = plan.grid.corner(row, column)
            if mask.patch_class(*at, plan.grid.l0_side) != BACKGROUND:
                assert (row, column) in looked_at
        assert len(looked_at) < 0.95 * plan.grid.n_rows * plan.grid.n_columns


def test_a_grid_dataset_reads_the_planned_cells_of_every_slide_in_turn(slides):
    plans = [plan_slide(slide, 64, None) for slide in slides]
    dataset = GridDataset(slides, plans, {"0": 0, "1": 1}, 64)
    assert len(dataset) == sum(len(plan.cells) for plan in plans)
    for position in (0, len(plans[0].cells) - 1, len(plans[0].cells), len(dataset) - 1):
        at, row, column = dataset.place(position)
        assert at == (position >= len(plans[0].cells))
        sample = dataset[SampleKey(0, position)]
        assert (sample["id"], sample["label"]) == (slides[at].id, int(slides[at].label))
        expected = _reader(slides[at], 64).read(column * 64, row * 64)
        assert np.array_equal(sample["image"].permute(1, 2, 0), expected)
