import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from umtrain.data.masks import CANCER_SHARE, TISSUE_SHARE, SlideMask, read_mask
from umtrain.data.wsi import SlideInfo
from umtrain.errors import DataError

MASKS = npst.arrays(
    np.uint8,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.integers(0, 2),
)


def info(width_px, height_px):
    return SlideInfo(width_px, height_px, (1.0,), None, "test")


def _write(path, array):
    Image.fromarray(array).save(path)
    return path


def _whole(mask, margin):
    """The mask at the slide's own resolution, with background around it."""
    full = np.kron(mask.classes, np.ones((mask.downsample,) * 2, np.uint8))
    return np.pad(full, margin)


@settings(max_examples=100)
@given(MASKS, st.integers(1, 6), st.integers(-9, 40), st.integers(-9, 40), st.integers(1, 30))
def test_shares_and_class_are_those_of_the_pixels_of_the_patch(classes, downsample, x, y, side):
    mask = SlideMask(classes, downsample)
    patch = _whole(mask, 100)[100 + y : 100 + y + side, 100 + x : 100 + x + side]
    expected = np.bincount(patch.ravel(), minlength=3) / side**2
    assert np.allclose(mask.shares(x, y, side), expected, atol=1e-12)
    _, benign, cancer = expected
    assume(all(abs(share - limit) > 1e-9 for share, limit in ((cancer, CANCER_SHARE),)))
    if cancer > CANCER_SHARE:
        assert mask.patch_class(x, y, side) == 2
    else:
        assume(abs(benign + cancer - TISSUE_SHARE) > 1e-9)
        assert mask.patch_class(x, y, side) == (benign + cancer > TISSUE_SHARE)


@settings(max_examples=100)
@given(MASKS, st.integers(1, 6), st.integers(0, 9), st.data())
def test_a_drawn_point_lies_where_its_class_is(classes, downsample, seed, data):
    mask = SlideMask(classes, downsample)
    assert mask.present == tuple(np.unique(classes))
    wanted = data.draw(st.sampled_from(mask.present))
    x, y = mask.draw(wanted, np.random.default_rng(seed))
    assert classes[int(y // downsample), int(x // downsample)] == wanted


def test_every_pixel_of_a_class_is_drawn_equally_often():
    classes = np.zeros((3, 5), np.uint8)
    classes[0, 0] = classes[2, 1:5] = 2
    rng = np.random.default_rng(0)
    points = [SlideMask(classes, 1).draw(2, rng) for _ in range(2000)]
    counts = np.zeros(classes.shape)
    for x, y in points:
        counts[int(y), int(x)] += 1
    assert np.all(abs(counts[classes == 2] / 2000 - 1 / 5) < 0.04)


@settings(max_examples=60)
@given(
    st.sampled_from([1, 2, 4, 8, 16, 32]),
    st.integers(160, 900),
    st.integers(160, 900),
    st.booleans(),
)
def test_the_downsample_follows_from_the_sizes(tmp_path_factory, downsample, width, height, cut):
    # Cut off or filled up, as the tool that made the mask has it.
    shape = tuple(n // downsample if cut else -(-n // downsample) for n in (height, width))
    path = tmp_path_factory.getbasetemp() / "mask.png"
    assert read_mask(_write(path, np.zeros(shape, np.uint8)), info(width, height)).downsample == (
        downsample
    )


def test_a_downsample_that_is_no_power_of_two_is_found_too(tmp_path):
    path = _write(tmp_path / "m.png", np.zeros((100, 60), np.uint8))
    assert read_mask(path, info(600, 1000)).downsample == 10


def test_a_mask_may_have_more_pixels_than_pillow_thinks_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = _write(tmp_path / "m.png", np.zeros((32, 32), np.uint8))
    assert read_mask(path, info(512, 512)).downsample == 16
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((32, 32), 255, np.uint8), "has the values 255; a mask is an 8-bit PNG"),
        (np.zeros((32, 24), np.uint8), "is 24×32 px and its slide 512×512, which is no whole"),
        (np.zeros((32, 32, 3), np.uint8), "got pixels of mode RGB; a mask is an 8-bit PNG"),
    ],
)
def test_what_is_no_mask_of_the_slide_is_refused(tmp_path, array, words):
    with pytest.raises(DataError) as caught:
        read_mask(_write(tmp_path / "m.png", array), info(512, 512))
    assert f"{tmp_path / 'm.png'}: {words}" in str(caught.value)


def test_a_mask_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such mask"):
        read_mask(tmp_path / "m.png", info(512, 512))
    (tmp_path / "m.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"m.png: not readable as a mask"):
        read_mask(tmp_path / "m.png", info(512, 512))
