import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.augment import RadiographAugment, SlideAugment, scale_stains, warp
from umtrain.data.frame import transform

STILL = SlideAugment(stain_scale=0.0, stain_shift=0.0)
SEEDS = st.integers(0, 2**32)


def tissue(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_slides_are_turned_and_mirrored_in_all_eight_ways():
    image = tissue(8)
    ways = {
        turned.tobytes()
        for k in range(4)
        for turned in (np.rot90(image, k), np.rot90(image, k)[:, ::-1])
    }
    seen = {STILL(image, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert len(ways) == 8
    assert seen == ways


@given(SEEDS)
def test_an_augmented_slide_is_a_contiguous_copy(seed):
    image = tissue(16)
    before = image.copy()
    changed = SlideAugment()(image, np.random.default_rng(seed))
    assert changed.flags.c_contiguous
    assert not np.shares_memory(changed, image)
    assert np.array_equal(image, before)


def test_stains_left_as_they_are_change_no_pixel():
    values = np.arange(256, dtype=np.uint8)
    image = np.stack(np.meshgrid(values[::5], values[::5], values[::5]), axis=-1).reshape(1, -1, 3)
    unchanged = scale_stains(image, np.ones(3), np.zeros(3))
    # The table of densities has 4096 steps: an odd bright value may round to its neighbour.
    assert np.abs(unchanged.astype(int) - image).max() <= 1


def test_scaling_all_stains_scales_optical_density():
    image = tissue(32) // 2 + 64
    changed = scale_stains(image, np.full(3, 1.2), np.zeros(3))
    density = -np.log((image + 1.0) / 256)
    expected = np.clip(256 * np.exp(-1.2 * density) - 1, 0, 255)
    assert np.abs(changed - expected).max() < 1


def test_more_haematoxylin_darkens_red_most_and_white_glass_stays_white():
    purple = np.full((4, 4, 3), (140, 110, 180), np.uint8)
    white = np.full((4, 4, 3), 255, np.uint8)
    more = np.array([1.3, 1.0, 1.0])
    drop = purple.astype(int) - scale_stains(purple, more, np.zeros(3))
    assert (drop[..., 0] > drop[..., 2]).all()
    assert (drop > 0).all()
    assert (scale_stains(white, more, np.zeros(3)) == 255).all()


def test_tiles_leave_no_seams():
    image = tissue(50)
    large = np.tile(image, (11, 12, 1))
    arguments = np.array([0.97, 1.04, 1.01]), np.array([0.02, -0.03, 0.01])
    assert np.array_equal(
        scale_stains(large, *arguments), np.tile(scale_stains(image, *arguments), (11, 12, 1))
    )


def test_augmenting_a_slide_needs_its_copy_and_a_few_mib():
    image = np.full((2000, 2000, 3), 200, np.uint8)
    tracemalloc.start()
    SlideAugment()(image, np.random.default_rng(0))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < image.nbytes + 8 * 2**20


def dot(shape, x, y):
    """A bright spot of a few pixels, its centre at (x, y)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.rint(40_000 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 2.0**2))).astype(
        np.uint16
    )


def centroid(pixels):
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    weights = pixels / pixels.sum(dtype=float)
    return np.array([(columns * weights).sum(), (rows * weights).sum()])


@given(SEEDS, st.floats(40, 88), st.floats(40, 216))
def test_a_dot_on_a_keypoint_stays_on_it(seed, x, y):
    keypoint = np.array([[x, y]])
    # Exposure bends the spot's profile, not its centre.
    changed, moved = RadiographAugment()(
        dot((256, 128), x, y), keypoint, np.random.default_rng(seed)
    )
    assert np.abs(centroid(changed) - transform(keypoint, moved)[0]).max() < 0.1


@given(SEEDS, st.floats(0, 127), st.floats(0, 255))
def test_keypoints_stay_in_the_frame(seed, x, y):
    keypoints = np.array([[x, y], [64.0, 128.0]])
    _, moved = RadiographAugment()(dot((256, 128), x, y), keypoints, np.random.default_rng(seed))
    placed = transform(keypoints, moved)
    assert (placed >= 0).all()
    assert (placed <= [127, 255]).all()


@given(SEEDS)
def test_changes_stay_within_their_limits(seed):
    augment = RadiographAugment(rotation_deg=5, scaling=0.1, mirror=0)
    _, moved = augment(
        np.ones((64, 32), np.uint16), np.array([[16.0, 32.0]]), np.random.default_rng(seed)
    )
    scale = np.sqrt(np.linalg.det(moved[:, :2]))
    angle_deg = np.degrees(np.arctan2(moved[1, 0], moved[0, 0]))
    assert 0.9 <= scale <= 1.1
    assert abs(angle_deg) <= 5


@pytest.mark.parametrize(("mirror", "sign"), [(0.0, 1), (1.0, -1)])
def test_a_mirroring_map_has_a_negative_determinant(mirror, sign):
    augment = RadiographAugment(mirror=mirror)
    _, moved = augment(
        np.ones((64, 32), np.uint16), np.array([[16.0, 32.0]]), np.random.default_rng(0)
    )
    assert np.sign(np.linalg.det(moved[:, :2])) == sign


def test_a_map_that_does_nothing_leaves_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 20), dtype=np.uint16)
    assert np.array_equal(warp(pixels, np.eye(2, 3)), pixels)


def test_what_comes_from_outside_is_zero():
    shifted = warp(np.full((10, 6), 9, np.uint16), np.array([[1.0, 0, 2], [0, 1, 3]]))
    assert (shifted[:3] == 0).all()
    assert (shifted[:, :2] == 0).all()
    assert (shifted[3:, 2:] == 9).all()


def test_exposure_keeps_zero_at_zero_and_grey_values_in_order():
    augment = RadiographAugment(rotation_deg=0, scaling=0, shift=0, mirror=0)
    ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    changed, _ = augment(ramp, np.zeros((1, 2)), np.random.default_rng(3))
    assert changed[0, 0] == 0
    assert (np.diff(changed.ravel().astype(int)) >= 0).all()
    assert not np.array_equal(changed, ramp)
