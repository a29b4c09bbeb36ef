"""CT volumes as files hold them: Hounsfield units, order, orientation, spacing; and what is not."""

import shutil

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from umtrain.data.ct import read_ct
from umtrain.data.synthetic.ct_dicom import SeriesHeader, write_series
from umtrain.errors import DataError

SPACING_MM = (2.5, 0.8, 0.7)
# Slices towards the head, rows towards the back, columns to the left.
HU = np.random.default_rng(0).integers(-1000, 1500, (5, 6, 7)).astype(np.int16)
AFFINE = np.diag([2.5, 0.8, 0.7, 1.0])


@pytest.fixture
def series(tmp_path):
    header = SeriesHeader("test", "P1", SPACING_MM, (-10.0, 20.0, -300.0))
    write_series(tmp_path / "series", HU.astype(np.float32), header)
    return tmp_path / "series"


def edit(series, number, **attributes):
    """Change attributes of one slice; None takes one away."""
    path = series / f"ct_{number:04d}.dcm"
    file = pydicom.dcmread(path)
    for name, value in attributes.items():
        if value is None:
            del file[name]
        else:
            setattr(file, name, value)
    file.save_as(path)
    return path


def write_nifti(path, hu, affine_ras, **header):
    image = nibabel.Nifti1Image(hu, affine_ras)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def as_stored(axes):
    """HU with axes towards e.g. "LPS", and the affine that says so."""
    turn = ornt_transform(axcodes2ornt("SPL"), axcodes2ornt(axes))
    turned = nibabel.orientations.apply_orientation(HU, turn)
    to_ras = np.zeros((4, 4))
    to_ras[0, 2], to_ras[1, 1], to_ras[2, 0], to_ras[3, 3] = -0.7, -0.8, 2.5, 1
    return turned, to_ras @ inv_ornt_aff(turn, HU.shape)


def test_a_series_is_read_in_the_order_of_its_positions_whatever_its_names(series):
    volume = read_ct(series)
    assert np.array_equal(volume.hu, HU)
    assert volume.spacing_mm == pytest.approx(SPACING_MM)
    first, last = series / "ct_0001.dcm", series / "ct_0005.dcm"
    first.rename(series / "swap")
    last.rename(first)
    (series / "swap").rename(last)
    assert np.array_equal(read_ct(series).hu, HU)


@given(st.permutations("SPL"), st.tuples(*[st.booleans()] * 3))
def test_a_nifti_file_is_turned_to_the_same_axes_however_it_is_stored(
    tmp_path_factory, order, flips
):
    opposite = {"S": "I", "P": "A", "L": "R"}
    axes = [opposite[axis] if flip else axis for axis, flip in zip(order, flips, strict=True)]
    stored, affine = as_stored(axes)
    path = write_nifti(tmp_path_factory.getbasetemp() / "turned.nii.gz", stored, affine)
    volume = read_ct(path)
    assert np.array_equal(volume.hu, HU)
    assert volume.spacing_mm == pytest.approx(SPACING_MM)


def test_a_sagittal_series_is_turned_to_the_same_axes(tmp_path):
    header = SeriesHeader("test", "P1", (0.7, 2.5, 0.8), (0.0, 0.0, 0.0))
    sagittal = np.transpose(HU, (2, 0, 1)).astype(np.float32)  # left, head, back
    write_series(tmp_path / "s", sagittal, header)
    for path in sorted((tmp_path / "s").iterdir()):
        file = pydicom.dcmread(path)
        at = float(file.ImagePositionPatient[2])
        file.ImageOrientationPatient = [0, 1, 0, 0, 0, 1]  # columns to the back, rows to the head
        file.ImagePositionPatient = [at, 0, 0]
        file.save_as(path)
    volume = read_ct(tmp_path / "s")
    assert np.array_equal(volume.hu, HU)
    assert volume.spacing_mm == pytest.approx(SPACING_MM)


def test_slope_intercept_and_padding_make_hounsfield_units(series):
    path = edit(series, 5, RescaleSlope=2, RescaleIntercept=-3000)
    stored = pydicom.dcmread(path).pixel_array.astype(int)
    assert np.array_equal(read_ct(series).hu[0], np.maximum(2 * stored - 3000, -1024))
    file = pydicom.dcmread(path)
    file.add_new("PixelPaddingValue", "US", int(stored[0, 0]))
    file.save_as(path)
    assert read_ct(series).hu[0, 0, 0] == -1024


def test_nifti_units_and_slope_are_applied(tmp_path):
    stored, affine = as_stored("LPS")
    image = nibabel.Nifti1Image(stored, np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine)
    image.header.set_xyzt_units("meter")
    image.header.set_slope_inter(1, -24)
    image.to_filename(tmp_path / "m.nii")
    volume = read_ct(tmp_path / "m.nii")
    assert volume.spacing_mm == pytest.approx(SPACING_MM, rel=1e-5)
    assert np.array_equal(volume.hu, np.maximum(HU - 24, -1024))


@pytest.mark.parametrize(
    ("number", "attributes", "words"),
    [
        (3, {"Modality": "MR"}, r"ct_0003.dcm: Modality is MR, expected CT"),
        (3, {"SeriesInstanceUID": "1.2.3"}, r"ct_0003.dcm: SeriesInstanceUID differs"),
        (3, {"PixelSpacing": [0.9, 0.7]}, r"ct_0003.dcm: PixelSpacing differs"),
        (2, {"PixelSpacing": None}, r"ct_0002.dcm: PixelSpacing is missing"),
        (1, {"PixelSpacing": [0, 1]}, r"expected millimetres above 0"),
        (2, {"ImagePositionPatient": None}, r"ct_0002.dcm: ImagePositionPatient is missing"),
        (2, {"ImageOrientationPatient": [1, 0, 0, 0, 0.8, 0.6]}, "ImageOrientationPatient differs"),
        (1, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "two unit vectors at a right angle"),
        (2, {"RescaleType": "US"}, r"ct_0002.dcm: RescaleType is US, expected HU"),
        (2, {"RescaleSlope": None, "RescaleIntercept": None}, "has neither RescaleSlope"),
        (2, {"NumberOfFrames": 2}, "has 2 frames, expected 1"),
        (4, {"ImagePositionPatient": [-10, 20, -295]}, "lie at the same place"),
        (4, {"ImagePositionPatient": [-10, 20, -298]}, r"are 2.00 mm, expected 2.50.*uneven"),
    ],
)
def test_a_wrong_slice_is_refused_by_name(series, number, attributes, words):
    edit(series, number, **attributes)
    with pytest.raises(DataError, match=words):
        read_ct(series)


def test_a_missing_slice_is_refused_with_its_neighbours(series):
    (series / "ct_0003.dcm").unlink()
    with pytest.raises(DataError, match=r"ct_0004.dcm and ct_0002.dcm are 5.00 mm.*1 missing"):
        read_ct(series)


def test_a_tilted_gantry_is_refused(series):
    for number in range(1, 6):
        edit(series, number, ImagePositionPatient=[0, 0.5 * number, -2.5 * number])
    with pytest.raises(DataError, match=r"are 11\.3° off a right angle"):
        read_ct(series)


def test_a_damaged_slice_is_named(series):
    path = series / "ct_0002.dcm"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"ct_0002.dcm: damaged or truncated"):
        read_ct(series)


def test_files_that_are_no_slices_are_left_alone(series):
    (series / "DICOMDIR").write_bytes(b"index")
    (series / "notes.txt").write_text("not a slice")
    assert np.array_equal(read_ct(series).hu, HU)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: (p / "x").mkdir(), "holds 0 slices, expected at least 2"),
        (lambda p: (p / "x").write_text("x"), "is no CT volume; expected a folder"),
        (lambda p: None, "no such file or folder"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(DataError, match=words):
        read_ct(tmp_path / "x")


def test_a_nifti_file_that_cannot_be_placed_or_read_is_refused(tmp_path):
    path = tmp_path / "x.nii.gz"
    write_nifti(path, HU, None)
    with pytest.raises(DataError, match="does not say how it lies in the patient"):
        read_ct(path)
    write_nifti(path, np.stack([HU, HU], axis=3), AFFINE)
    with pytest.raises(DataError, match="expected one volume"):
        read_ct(path)
    write_nifti(path, HU, AFFINE)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        read_ct(path)
    sheared = AFFINE.copy()
    sheared[1, 0] = 0.5
    write_nifti(path, HU, sheared)
    with pytest.raises(DataError, match="off a right angle"):
        read_ct(path)


def test_no_patient_is_named_in_an_error(series):
    for number in range(1, 6):
        edit(series, number, PatientName="Doe^Jane", PatientID="4711")
    edit(series, 2, Modality="MR")
    with pytest.raises(DataError) as caught:
        read_ct(series)
    assert "Doe" not in str(caught.value)
    assert "4711" not in str(caught.value)


def test_a_copy_of_a_series_is_the_same_volume(series, tmp_path):
    shutil.copytree(series, tmp_path / "copy")
    assert np.array_equal(read_ct(tmp_path / "copy").hu, read_ct(series).hu)
    assert io_orientation(AFFINE).tolist() == [[0, 1], [1, 1], [2, 1]]
