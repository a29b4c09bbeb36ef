import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from umtrain.data import wsi
from umtrain.data.wsi import SlideFrame, SlideInfo, plan_frame, read_slide, slide_info
from umtrain.errors import DataError

MPP = 0.5


def _image(height: int, width: int) -> np.ndarray:
    """Smooth colours with a dark square: survives JPEG, and shows any shift or seam."""
    noise = np.random.default_rng(0).integers(60, 200, (height // 16 + 2, width // 16 + 2, 3))
    coarse = Image.fromarray(noise.astype(np.uint8))
    image = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 4 : height // 4 + 40, width // 4 : width // 4 + 40] = (90, 20, 120)
    return image


def _write(path: Path, image: np.ndarray, n_levels: int = 3, mpp: float | None = MPP) -> Path:
    stated = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(n_levels):
            pixels = np.asarray(Image.fromarray(image).reduce(4**level))
            tiff.write(
                pixels,
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95},
                subfiletype=int(level > 0),
                metadata=None,
                **stated,
            )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wsi")


@pytest.fixture(scope="module")
def square(folder: Path) -> Path:
    return _write(folder / "square.tif", _image(768, 768))


@pytest.fixture(scope="module")
def wide(folder: Path) -> Path:
    return _write(folder / "wide.tif", _image(320, 640))


@pytest.fixture(scope="module")
def odd(folder: Path) -> Path:
    return _write(folder / "odd.tif", _image(611, 613))


@pytest.fixture(scope="module")
def unstated(folder: Path) -> Path:
    return _write(folder / "unstated.tif", _image(256, 256), n_levels=1, mpp=None)


def test_header_gives_sides_levels_mpp_and_vendor(wide: Path) -> None:
    info = slide_info(wide)
    assert (info.width_px, info.height_px) == (640, 320)
    assert info.level_downsamples == (1.0, 4.0, 16.0)
    assert info.mpp == pytest.approx(MPP)
    assert info.vendor == "generic-tiff"


def test_mpp_that_the_file_does_not_state_is_none(unstated: Path) -> None:
    assert slide_info(unstated).mpp is None


def test_reading_at_the_slides_own_size_returns_its_pixels(square: Path) -> None:
    image, frame = read_slide(square, 768)
    stored = tifffile.imread(square, key=0)
    assert frame == SlideFrame(0, 0, 1)
    assert np.abs(image.astype(int) - stored).max() <= 3  # two JPEG decoders round differently


def test_resize_keeps_the_aspect_and_centres_on_white(wide: Path) -> None:
    image, frame = read_slide(wide, 160)
    assert image.shape == (160, 160, 3)
    assert image.dtype == np.uint8
    assert frame == SlideFrame(0, -160, 4)
    assert (image[:40] == 255).all()
    assert (image[120:] == 255).all()
    assert (image[40:120].min(axis=2) < 250).all()


@settings(max_examples=30, deadline=None)
@given(res=st.integers(40, 900), strip_rows=st.integers(1, 900))
def test_strips_join_without_seams(square: Path, res: int, strip_rows: int) -> None:
    whole, _ = read_slide(square, res, strip_rows=10_000)
    in_strips, _ = read_slide(square, res, strip_rows=strip_rows)
    assert np.abs(whole.astype(int) - in_strips).max() <= 1


@settings(max_examples=20, deadline=None)
@given(res=st.integers(40, 300), strip_rows=st.integers(1, 300))
def test_strips_join_where_levels_do_not_divide_evenly(
    odd: Path, res: int, strip_rows: int
) -> None:
    whole, _ = read_slide(odd, res, strip_rows=10_000)
    in_strips, _ = read_slide(odd, res, strip_rows=strip_rows)
    # OpenSlide itself interpolates where a level-0 position is between the level's pixels.
    assert np.abs(whole.astype(int) - in_strips).mean() <= 1


@pytest.mark.parametrize("res", [48, 100, 192, 300, 700])
def test_brightness_survives_any_scale(square: Path, res: int) -> None:
    image, _ = read_slide(square, res)
    assert image.mean() == pytest.approx(tifffile.imread(square, key=0).mean(), abs=1.0)


def test_fine_stripes_become_grey_instead_of_aliasing(folder: Path) -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    path = _write(folder / "stripes.tif", stripes, n_levels=1)
    image, _ = read_slide(path, 171)
    assert np.abs(image[4:-4, 4:-4].astype(int) - 127).max() < 40


def test_a_coarser_level_shows_the_slide_in_the_same_place(folder: Path) -> None:
    y, x = np.mgrid[0:768, 0:768]
    waves = 128 + 60 * np.stack([np.sin(x / 30), np.sin(y / 37), np.sin((x + y) / 50)], axis=-1)
    pyramid = _write(folder / "pyramid.tif", waves.astype(np.uint8))
    single = _write(folder / "single.tif", waves.astype(np.uint8), n_levels=1)
    from_pyramid, _ = read_slide(pyramid, 150)
    from_full, _ = read_slide(single, 150)
    inner = np.s_[3:-3, 3:-3]
    assert np.abs(from_pyramid[inner].astype(int) - from_full[inner]).mean() < 1


@given(
    x=st.floats(-1e4, 1e4),
    y=st.floats(-1e4, 1e4),
    scale=st.floats(0.1, 50),
    origin=st.floats(-1e3, 1e3),
)
def test_frames_map_both_ways(x: float, y: float, scale: float, origin: float) -> None:
    frame = SlideFrame(origin, -origin, scale)
    assert frame.to_out(*frame.to_l0(x, y)) == pytest.approx((x, y), abs=1e-6)


@pytest.mark.parametrize(("fit", "mpp"), [("resize", None), ("pad", 2.0), ("crop", 1.0)])
def test_frame_says_where_a_landmark_lands(square: Path, fit: str, mpp: float | None) -> None:
    image, frame = read_slide(square, 320, fit=fit, mpp=mpp)
    x, y = frame.to_out(768 / 4 + 20, 768 / 4 + 20)
    red, green, blue = image[int(y), int(x)].astype(int)
    assert (abs(red - 90), abs(green - 20), abs(blue - 120)) < (12, 12, 12)


def test_pad_centres_the_slide_at_the_asked_mpp(square: Path) -> None:
    image, frame = read_slide(square, 256, fit="pad", mpp=2.0)
    assert frame == SlideFrame(768 / 2 - 512, 768 / 2 - 512, 4.0)
    assert (image[:32] == 255).all()
    assert (image[32:224, 32:224].min(axis=2) < 250).all()


def test_crop_takes_the_centre(square: Path) -> None:
    image, frame = read_slide(square, 128, fit="crop", mpp=MPP)
    stored = tifffile.imread(square, key=0)
    assert frame == SlideFrame(320, 320, 1)
    assert np.abs(image.astype(int) - stored[320:448, 320:448]).max() <= 3


def test_crop_of_a_small_slide_is_padded_white(wide: Path) -> None:
    image, _ = read_slide(wide, 400, fit="crop", mpp=MPP)
    assert (image[:40] == 255).all()
    assert (image[40:360].min(axis=2) < 250).all()


def test_the_manifests_mpp_wins_over_the_files(square: Path) -> None:
    _, frame = read_slide(square, 100, fit="crop", mpp=1.0, slide_mpp=0.25)
    assert frame.scale == pytest.approx(4.0)


def test_a_slide_smaller_than_res_is_enlarged_and_says_so(square: Path) -> None:
    image, frame = read_slide(square, 1000)
    assert frame.enlarges
    assert image.mean() == pytest.approx(tifffile.imread(square, key=0).mean(), abs=1.0)


def test_pad_refuses_a_slide_that_does_not_fit_and_names_the_res_it_needs(square: Path) -> None:
    with pytest.raises(DataError, match=r"square\.tif: .*768×768.*needs res=384.*fit=crop"):
        read_slide(square, 300, fit="pad", mpp=1.0)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_unknown_mpp_is_refused_not_guessed(unstated: Path, fit: str) -> None:
    with pytest.raises(DataError, match=r"unstated\.tif.*manifest's mpp column"):
        read_slide(unstated, 100, fit=fit, mpp=1.0)
    read_slide(unstated, 300, fit=fit, mpp=1.0, slide_mpp=1.0)


def test_pad_needs_a_target_mpp(square: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.mpp"):
        read_slide(square, 100, fit="pad")


def test_impossible_mpp_is_refused(square: Path) -> None:
    with pytest.raises(DataError, match="must be positive"):
        read_slide(square, 100, fit="crop", mpp=1.0, slide_mpp=0.0)


def test_unknown_fit_lists_the_known_ones() -> None:
    info = SlideInfo(100, 100, (1.0,), None, "x")
    with pytest.raises(DataError, match="resize, pad, crop"):
        plan_frame(info, 10, "stretch", None, None)


def test_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tif: no such slide file"):
        slide_info(folder / "gone.tif")


def test_a_file_that_is_no_slide_is_named(folder: Path) -> None:
    path = folder / "notes.tif"
    path.write_text("not a slide")
    with pytest.raises(DataError, match=r"notes\.tif: not a slide"):
        slide_info(path)


def test_a_broken_tile_is_reported_with_the_files_name(folder: Path) -> None:
    path = _write(folder / "broken.tif", _image(512, 512), n_levels=1)
    with tifffile.TiffFile(path) as tiff:
        offset, n_bytes = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * n_bytes)
    with pytest.raises(DataError, match=r"broken\.tif: OpenSlide cannot read"):
        read_slide(path, 256)


def _mean(path: Path) -> float:
    return float(read_slide(path, 64)[0].mean())


def test_slides_read_in_worker_processes(square: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_mean, [square]) == [_mean(square)]


BOUNDS = {f"openslide.bounds-{name}": value for name, value in (("x", "40"), ("y", "7"))}


@pytest.mark.parametrize(
    ("width", "height", "origin"),
    [("900", "600", (40, 7)), ("1000", "600", (0, 0)), (None, "600", (0, 0))],
)
def test_qupath_counts_from_the_bounds_where_they_are_smaller_both_ways(width, height, origin):
    stated = {**BOUNDS, "openslide.bounds-height": height}
    if width is not None:
        stated["openslide.bounds-width"] = width
    assert wsi._qupath_origin_px(stated, (1000, 800)) == origin
