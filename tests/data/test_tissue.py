import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from umtrain.data.synthetic.slides import SlideSpec, write_slide
from umtrain.data.tissue import find_tissue, otsu_threshold, tissue_mask

GLASS, STAINED = (243, 241, 244), (196, 120, 180)


def _noisy(colour, shape=(48, 64)):
    noise = np.random.default_rng(0).normal(0, 1.5, (*shape, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


@settings(max_examples=50)
@given(npst.arrays(np.int64, st.integers(2, 12), elements=st.integers(0, 50)))
def test_otsus_threshold_leaves_the_least_variance_within_the_classes(counts):
    levels = np.repeat(np.arange(len(counts)), counts)

    def within(threshold):
        parts = levels[levels <= threshold], levels[levels > threshold]
        return sum(part.var() * len(part) for part in parts if len(part))

    best = min((within(level) for level in range(len(counts))), default=0.0)
    assert abs(within(otsu_threshold(counts)) - best) < 1e-6


def test_an_empty_slide_has_no_tissue():
    assert not tissue_mask(_noisy(GLASS)).any()
    assert not tissue_mask(np.full((9, 9, 3), 255, np.uint8)).any()


def test_a_slide_that_is_tissue_from_edge_to_edge_is_all_tissue():
    image = _noisy(STAINED)
    image[:, 32:] = _noisy((120, 70, 150), (48, 32))
    assert tissue_mask(image).all()


def test_stained_pixels_on_glass_are_tissue():
    image = _noisy(GLASS)
    image[10:30, 20:50] = _noisy(STAINED, (20, 30))
    expected = np.zeros(image.shape[:2], bool)
    expected[10:30, 20:50] = True
    wrong = np.argwhere(tissue_mask(image) != expected)
    assert all(8 <= row < 32 and 18 <= column < 52 for row, column in wrong)  # a blurred edge
    assert len(wrong) < 150


def test_the_frame_places_the_tissue_on_the_slide(tmp_path):
    write_slide(SlideSpec("s", "p", "1", "train", 5), tmp_path / "s.tif", 512, None)
    tissue, frame = find_tissue(tmp_path / "s.tif", 64)
    assert tissue.shape == (64, 64)
    assert 0.2 < tissue.mean() < 0.8
    assert frame.to_l0(64, 64) == (512, 512)
