import logging
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders import JPEGLosslessSV1Decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from umtrain.data.radiograph import (
    RadiographImage,
    column_spacing_mm,
    pixel_spacing_mm,
    read_radiograph,
)
from umtrain.errors import DataError

_IDENTIFIER = "DOE^JANE"
_DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"


def _ramp(bits: int = 12, shape: tuple[int, int] = (48, 37)) -> np.ndarray:
    n = shape[0] * shape[1]
    return np.linspace(0, 2**bits - 1, n).round().astype(np.uint16).reshape(shape)


def _dataset(pixels: np.ndarray, bits: int = 12, **attributes: object) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _DIGITAL_XRAY
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = _DIGITAL_XRAY, "1.2.3.4"
    file.PatientName, file.PatientID = _IDENTIFIER, _IDENTIFIER
    file.set_pixel_data(pixels, "MONOCHROME2", bits, generate_instance_uid=False)
    for keyword, value in attributes.items():
        setattr(file, keyword, value)
    return file


def _save(file: FileDataset, path: Path) -> Path:
    file.save_as(path, enforce_file_format=True)
    return path


def _save_encoded(file: FileDataset, frame: bytes, syntax: str, path: Path) -> Path:
    file.PixelData = encapsulate([frame])
    file["PixelData"].VR = "OB"
    file.file_meta.TransferSyntaxUID = syntax
    return _save(file, path)


def _lut(table: list[int], first: int, bits: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table), first, bits])
    item.add_new("LUTData", "US", table)
    return Sequence([item])


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
        JPEGLSLossless,
    ],
)
def test_a_lossless_syntax_gives_the_same_pixels_as_the_uncompressed_file(
    tmp_path: Path, syntax: str
) -> None:
    plain = read_radiograph(_save(_dataset(_ramp()), tmp_path / "plain.dcm")).pixels
    file = _dataset(_ramp())
    if syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        file.compress(syntax, generate_instance_uid=False)
    file.file_meta.TransferSyntaxUID = syntax
    path = _save(file, tmp_path / "coded.dcm")
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_radiograph(path).pixels, plain)


@pytest.mark.parametrize(("syntax", "predictor"), [(JPEGLosslessSV1, 1), (JPEGLossless, 5)])
@pytest.mark.parametrize("bits", [12, 16])
def test_lossless_jpeg_gives_the_same_pixels_as_the_uncompressed_file(
    tmp_path: Path, syntax: str, predictor: int, bits: int
) -> None:
    pixels = _ramp(bits)
    plain = read_radiograph(_save(_dataset(pixels, bits), tmp_path / "plain.dcm")).pixels
    frame = imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=predictor, bitspersample=bits)
    path = _save_encoded(_dataset(pixels, bits), frame, syntax, tmp_path / "coded.dcm")
    np.testing.assert_array_equal(read_radiograph(path).pixels, plain)


def test_12_bit_lossy_jpeg_is_close_to_the_uncompressed_file(tmp_path: Path) -> None:
    plain = read_radiograph(_save(_dataset(_ramp()), tmp_path / "plain.dcm")).pixels
    frame = imagecodecs.jpeg8_encode(_ramp(), level=98, bitspersample=12)
    path = _save_encoded(_dataset(_ramp()), frame, JPEGExtended12Bit, tmp_path / "coded.dcm")
    error = np.abs(read_radiograph(path).pixels.astype(int) - plain)
    assert error.max() < 0.02 * 65535


def test_8_bit_lossy_jpeg_is_close_to_the_uncompressed_file(tmp_path: Path) -> None:
    pixels = _ramp(8).astype(np.uint8)
    plain = read_radiograph(_save(_dataset(pixels, 8), tmp_path / "plain.dcm")).pixels
    frame = imagecodecs.jpeg8_encode(pixels, level=98)
    path = _save_encoded(_dataset(pixels, 8), frame, JPEGBaseline8Bit, tmp_path / "coded.dcm")
    error = np.abs(read_radiograph(path).pixels.astype(int) - plain)
    assert error.max() < 0.03 * 65535


def test_big_endian_pixels_are_read_in_their_order(tmp_path: Path) -> None:
    plain = read_radiograph(_save(_dataset(_ramp()), tmp_path / "plain.dcm")).pixels
    file = _dataset(_ramp())
    file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    file.PixelData = _ramp().astype(">u2").tobytes()
    file["PixelData"].VR = "OW"
    path = tmp_path / "big.dcm"
    dcmwrite(path, file, implicit_vr=False, little_endian=False, enforce_file_format=True)
    np.testing.assert_array_equal(read_radiograph(path).pixels, plain)


def test_the_window_spans_the_full_range(tmp_path: Path) -> None:
    file = _dataset(_ramp(), WindowCenter=2048, WindowWidth=1001)
    pixels = read_radiograph(_save(file, tmp_path / "a.dcm")).pixels
    stored = _ramp()
    assert pixels.dtype == np.uint16
    assert set(pixels[stored <= 1547]) == {0}
    assert set(pixels[stored > 2547.5]) == {65535}
    expected = ((stored - 2047.5) / 1000 + 0.5) * 65535  # PS3.3 C.11.2.1.2.1
    between = (stored > 1548) & (stored < 2547)
    np.testing.assert_allclose(pixels[between], expected[between], atol=1)


def test_the_first_of_several_windows_is_used(tmp_path: Path) -> None:
    one = _dataset(_ramp(), WindowCenter=1000, WindowWidth=500)
    two = _dataset(_ramp(), WindowCenter=[1000, 3000], WindowWidth=[500, 100])
    np.testing.assert_array_equal(
        read_radiograph(_save(two, tmp_path / "two.dcm")).pixels,
        read_radiograph(_save(one, tmp_path / "one.dcm")).pixels,
    )


@settings(max_examples=25, deadline=None)
@given(
    centre=st.floats(-500, 5000),
    width=st.floats(2, 6000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    slope=st.sampled_from([1, 0.25, 3]),
)
def test_brighter_stored_values_never_become_darker(
    tmp_path_factory: pytest.TempPathFactory,
    centre: float,
    width: float,
    function: str,
    slope: float,
) -> None:
    file = _dataset(
        _ramp(),
        WindowCenter=f"{slope * centre:.4f}",
        WindowWidth=f"{max(2.0, slope * width):.4f}",
        VOILUTFunction=function,
        RescaleSlope=slope,
        RescaleIntercept=-7,
    )
    path = _save(file, tmp_path_factory.mktemp("window") / "a.dcm")
    try:
        pixels = read_radiograph(path).pixels
    except DataError as error:
        if "one grey value" not in str(error):  # else the window misses every pixel
            raise
        return
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()


def test_a_negative_rescale_slope_turns_the_grey_scale_round(tmp_path: Path) -> None:
    window = {"WindowCenter": 0, "WindowWidth": 2000}
    up = _dataset(_ramp(), RescaleSlope=1, RescaleIntercept=-2048, **window)
    down = _dataset(_ramp(), RescaleSlope=-1, RescaleIntercept=2048, **window)
    bright_up = read_radiograph(_save(up, tmp_path / "up.dcm")).pixels.astype(int)
    bright_down = read_radiograph(_save(down, tmp_path / "down.dcm")).pixels.astype(int)
    assert bright_up[-1, -1] == 65535
    assert bright_down[-1, -1] == 0
    np.testing.assert_allclose(bright_up + bright_down, 65535, atol=70)


def test_monochrome1_is_inverted_so_that_bone_is_bright(tmp_path: Path) -> None:
    window = {"WindowCenter": 1800, "WindowWidth": 3000}
    white_high = _save(_dataset(_ramp(), **window), tmp_path / "2.dcm")
    white_low = _save(
        _dataset(_ramp(), PhotometricInterpretation="MONOCHROME1", **window), tmp_path / "1.dcm"
    )
    total = read_radiograph(white_high).pixels.astype(int) + read_radiograph(white_low).pixels
    assert set(np.unique(total)) <= {65534, 65535, 65536}


def test_a_voi_lut_goes_before_the_window(tmp_path: Path) -> None:
    table = [min(255, i // 8) for i in range(4096)]  # 8 bits, longer than 256 entries
    file = _dataset(_ramp(), WindowCenter=100, WindowWidth=50, VOILUTSequence=_lut(table, 0, 8))
    pixels = read_radiograph(_save(file, tmp_path / "a.dcm")).pixels
    expected = np.array(table)[_ramp()] / 255 * 65535
    np.testing.assert_allclose(pixels, expected, atol=1)


def test_a_modality_lut_goes_before_the_voi_lut(tmp_path: Path) -> None:
    modality = [4095 - i for i in range(4096)]
    voi = [i * 16 for i in range(4096)]
    file = _dataset(
        _ramp(), ModalityLUTSequence=_lut(modality, 0, 16), VOILUTSequence=_lut(voi, 0, 16)
    )
    pixels = read_radiograph(_save(file, tmp_path / "a.dcm")).pixels
    np.testing.assert_array_equal(pixels, (4095 - _ramp()) * 16)


def test_without_a_window_a_hot_pixel_does_not_flatten_the_image(tmp_path: Path) -> None:
    stored = 1000 + _ramp(8)
    stored[0, 0] = 4095
    pixels = read_radiograph(_save(_dataset(stored), tmp_path / "a.dcm")).pixels
    assert np.percentile(pixels, 5) < 0.06 * 65535
    assert np.percentile(pixels, 95) > 0.94 * 65535


def test_signed_pixels_keep_their_order(tmp_path: Path) -> None:
    stored = _ramp().astype(np.int16) - 2048
    file = _dataset(_ramp(), PixelRepresentation=1, PixelData=stored.tobytes())
    pixels = read_radiograph(_save(file, tmp_path / "a.dcm")).pixels
    assert pixels[0, 0] == 0
    assert pixels[-1, -1] == 65535
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(tmp_path: Path, photometric: str) -> None:
    stored = 1000 + _ramp(8)
    stored[:, :20] = 4000
    file = _dataset(
        stored,
        PhotometricInterpretation=photometric,
        PixelPaddingValue=3900,
        PixelPaddingRangeLimit=4095,
    )
    pixels = read_radiograph(_save(file, tmp_path / "a.dcm")).pixels
    assert set(pixels[:, :20].ravel()) == {0}
    assert pixels[:, 20:].max() == 65535
    assert np.median(pixels[:, 20:]) == pytest.approx(65535 / 2, rel=0.05)


_SPACINGS = [
    ({"PixelSpacing": [0.2, 0.1]}, None, (0.2, 0.1), "PixelSpacing"),
    ({"PixelSpacing": [0.2, 0.1]}, 0.5, (0.2, 0.1), "PixelSpacing"),
    (
        {"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [0.4, 0.4]},
        None,
        (0.2, 0.1),
        "PixelSpacing",
    ),
    (
        {
            "ImagerPixelSpacing": [0.4, 0.2],
            "EstimatedRadiographicMagnificationFactor": 1.25,
        },
        0.5,
        (0.32, 0.16),
        "ImagerPixelSpacing / EstimatedRadiographicMagnificationFactor",
    ),
    ({"ImagerPixelSpacing": [0.4, 0.2]}, 0.5, (0.5, 0.5), "without its magnification"),
    ({"PixelSpacing": [0, 0]}, 0.5, (0.5, 0.5), "neither a positive"),
    ({"PixelSpacing": None}, 0.5, (0.5, 0.5), "neither a positive"),
    ({}, 0.5, (0.5, 0.5), "neither a positive"),
]


@pytest.mark.parametrize(("attributes", "manifest_mm", "expected", "source"), _SPACINGS)
def test_spacing_comes_from_the_file_before_the_manifest(
    tmp_path: Path,
    attributes: dict[str, object],
    manifest_mm: float | None,
    expected: tuple[float, float],
    source: str,
) -> None:
    path = _save(_dataset(_ramp(), **attributes), tmp_path / "a.dcm")
    image = read_radiograph(path)
    assert pixel_spacing_mm(image, manifest_mm, path) == pytest.approx(expected)
    assert column_spacing_mm(image, manifest_mm, path) == pytest.approx(expected[1])
    assert source in image.spacing_source


def test_without_any_spacing_the_error_says_where_to_put_it() -> None:
    image = RadiographImage(_ramp(), None, "the file has ImagerPixelSpacing alone")
    with pytest.raises(DataError, match=r"a\.dcm: no pixel spacing: .*alone.*column mm_per_px"):
        column_spacing_mm(image, None, Path("a.dcm"))


@pytest.mark.parametrize("wrong", [0.0, -0.1, float("nan"), float("inf")])
def test_a_spacing_in_the_manifest_that_is_no_length_is_refused(wrong: float) -> None:
    image = RadiographImage(_ramp(), None, "none")
    with pytest.raises(DataError, match=r"mm_per_px is .*expected a number above 0"):
        pixel_spacing_mm(image, wrong, Path("a.dcm"))


def _missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def _folder(path: Path) -> None:
    path.mkdir()


def _text(path: Path) -> None:
    path.write_text("image_id,path\n" * 40)


def _truncated(path: Path) -> None:
    _save(_dataset(_ramp()), path)
    path.write_bytes(path.read_bytes()[:-500])


def _truncated_deflated(path: Path) -> None:
    file = _dataset(np.random.default_rng(0).integers(0, 4096, (48, 37), np.uint16))
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    _save(file, path)
    path.write_bytes(path.read_bytes()[:-500])


def _broken_stream(path: Path) -> None:
    file = _dataset(_ramp())
    file.compress(JPEG2000Lossless, generate_instance_uid=False)
    frame = bytearray(file.PixelData)
    frame[60:] = bytes(len(frame) - 60)
    file.PixelData = bytes(frame)
    _save(file, path)


def _half_a_jpeg(path: Path) -> None:
    frame = imagecodecs.jpeg8_encode(_ramp(), lossless=True, predictor=1, bitspersample=12)
    _save_encoded(_dataset(_ramp()), frame[: len(frame) // 2], JPEGLosslessSV1, path)


def _no_pixels(path: Path) -> None:
    file = _dataset(_ramp())
    del file.PixelData
    _save(file, path)


def _no_rows(path: Path) -> None:
    file = _dataset(_ramp())
    del file.Rows
    _save(file, path)


def _frames(path: Path) -> None:
    _save(_dataset(np.stack([_ramp()] * 3)), path)


def _colour(path: Path) -> None:
    file = _dataset(_ramp())
    colours = np.zeros((8, 8, 3), np.uint8)
    file.set_pixel_data(colours, "RGB", 8, generate_instance_uid=False)
    _save(file, path)


def _wide(path: Path) -> None:
    file = _dataset(_ramp())
    file.BitsAllocated, file.BitsStored, file.HighBit = 32, 32, 31
    file.PixelData = _ramp().astype("<u4").tobytes()
    _save(file, path)


def _blank(path: Path) -> None:
    _save(_dataset(np.full((16, 16), 7, np.uint16)), path)


def _window_far_away(path: Path) -> None:
    _save(_dataset(_ramp(), WindowCenter=90000, WindowWidth=10), path)


def _window_of_no_width(path: Path) -> None:
    _save(_dataset(_ramp(), WindowCenter=2000, WindowWidth=0), path)


def _video(path: Path) -> None:
    _save_encoded(_dataset(_ramp()), b"\0" * 64, "1.2.840.10008.1.2.4.100", path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "no such file; correct the manifest"),
        (_folder, "cannot be opened: Is a directory"),
        (_text, "not a DICOM file .*expected DICOM Part 10"),
        (_truncated, "damaged or truncated.*fetch the file again|truncated file or no image"),
        (_truncated_deflated, "damaged or truncated.*fetch the file again"),
        (_broken_stream, "damaged or truncated: its pixels cannot be decoded.*fetch"),
        (_half_a_jpeg, "damaged or truncated: its pixels cannot be decoded.*fetch"),
        (_no_pixels, "has no PixelData.*remove its row"),
        (_no_rows, "its header has no Rows"),
        (_frames, "has 3 frames, expected 1; export"),
        (_colour, r"colour image \(RGB, 3 samples per pixel\); expected MONOCHROME1"),
        (_wide, "32 bits per pixel, expected 8 or 16"),
        (_blank, "blank: all its pixels have one value"),
        (_window_far_away, "into one grey value; correct or remove WindowCenter"),
        (_window_of_no_width, "window cannot be applied .*correct or remove"),
        (_video, r"MPEG2 .*\(1\.2\.840\.10008\.1\.2\.4\.100\).*convert it to Explicit VR"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_reason(
    tmp_path: Path, make: object, message: str
) -> None:
    path = tmp_path / "film.dcm"
    make(path)
    with pytest.raises(DataError, match=rf"film\.dcm: .*({message})") as caught:
        read_radiograph(path)
    assert _IDENTIFIER not in str(caught.value)


def test_a_syntax_whose_codec_is_missing_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = imagecodecs.jpeg8_encode(_ramp(), lossless=True, predictor=1, bitspersample=12)
    path = _save_encoded(_dataset(_ramp()), frame, JPEGLosslessSV1, tmp_path / "a.dcm")
    read_radiograph(path)
    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(DataError, match=r"no codec.*JPEG Lossless.*Install one of: .*pylibjpeg"):
        read_radiograph(path)


def test_what_the_decoder_assumed_is_noted_and_logged_not_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = _dataset(_ramp())
    file.PixelData = file.PixelData + b"\0" * 100
    path = _save(file, tmp_path / "long.dcm")
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "umtrain"):
        warnings.simplefilter("error")
        image = read_radiograph(path)
    assert len(image.notes) == 1
    assert "100 bytes of excess padding" in image.notes[0]
    assert any("long.dcm" in message and "excess" in message for message in caplog.messages)


def test_no_identifier_is_even_read_from_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = _dataset(_ramp(), PatientComments=_IDENTIFIER, OperatorsName=_IDENTIFIER)
    path = tmp_path / "a.dcm"
    _save(file, path)
    # A date that cannot be parsed, holding a name: pydicom quotes such values in its warnings.
    content = path.read_bytes().replace(b"DOE^JANE", b"DOE^\xffJAN")
    path.write_bytes(content)
    with caplog.at_level(logging.DEBUG, "umtrain"):
        image = read_radiograph(path)
    assert image.notes == ()
    assert "DOE" not in caplog.text
    assert "DOE" not in image.spacing_source
