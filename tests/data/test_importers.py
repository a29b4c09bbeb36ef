from collections import Counter

import pytest

from umtrain.data.importers import detect_format, import_table
from umtrain.errors import ConfigError, ManifestError


def lay_out(folder, table, *files):
    """Write a table beside a folder with slides (empty files: importers do not open them)."""
    for file in files:
        path = folder / "slides" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "table.csv").write_text(table, encoding="utf-8")
    return folder / "table.csv"


def run_import(table, **options):
    folder = table.parent
    return import_table(table, slides_root=folder / "slides", output=folder / "m.csv", **options)


def refusal(table, error=ManifestError, **options):
    with pytest.raises(error) as caught:
        run_import(table, **options)
    assert not (table.parent / "m.csv").exists()
    return str(caught.value)


CAMELYON_TRAINING = [
    f"training/{label}/{label}_{i:03}.tif" for label in ("normal", "tumor") for i in range(1, 11)
]


@pytest.mark.parametrize("header", ["", "image,class,type,size\n"])
def test_camelyon16_has_its_own_test_set_and_labels_training_slides_by_name(tmp_path, header):
    reference = header + "test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n"
    tests = ["testing/images/test_001.tif", "testing/images/test_002.tif"]
    table = lay_out(tmp_path, reference, *tests, *CAMELYON_TRAINING, "masks/tumor_001_mask.tif")
    manifest = run_import(table)
    counts = Counter((slide.label, slide.split) for slide in manifest.records)
    assert counts == {
        **{(label, "train"): 9 for label in ("normal", "tumor")},
        **{(label, "val"): 1 for label in ("normal", "tumor")},
        **{(label, "test"): 1 for label in ("normal", "tumor")},
    }
    assert {slide.slide_id: slide.label for slide in manifest.split("test")} == {
        "test_001": "tumor",
        "test_002": "normal",
    }
    assert all(slide.slide_id.startswith(slide.label) for slide in manifest.split("train"))


def test_camelyon16_knows_two_classes(tmp_path):
    table = lay_out(tmp_path, "test_001,Tumor,IDC\ntest_002,Benign,None\n", "test_001.tif")
    text = refusal(table)
    assert "row 2: the class is 'Benign', expected Normal or Tumor" in text


PANDA = (
    "image_id,data_provider,isup_grade,gleason_score\na1,radboud,0,negative\nb2,karolinska,3,4+3\n"
)


def test_panda_is_cancer_from_grade_1_or_its_grades(tmp_path):
    table = lay_out(tmp_path, PANDA, "a1.tiff", "b2.tiff")
    binary = run_import(table)
    grades = run_import(table, table_format="panda_isup")
    assert {slide.slide_id: slide.label for slide in binary.records} == {
        "a1": "benign",
        "b2": "cancer",
    }
    assert grades.classes == ("0", "3")


def test_panda_has_grades_0_to_5(tmp_path):
    table = lay_out(tmp_path, PANDA.replace(",3,", ",7,"), "a1.tiff", "b2.tiff")
    assert "row 3: isup_grade is '7', expected 0 to 5" in refusal(table)


def test_clam_names_patients_and_keeps_them_together(tmp_path):
    rows = [f"{i},case{i // 2},slide{i}.svs,{'xy'[i % 4 < 2]}\n" for i in range(24)]
    table = lay_out(
        tmp_path,
        ",case_id,slide_id,label\n" + "".join(rows),
        *(f"slide{i}.svs" for i in range(24)),
    )
    manifest = run_import(table)
    splits = {(slide.patient_id, slide.split) for slide in manifest.records}
    assert len(splits) == 12
    assert {split for _, split in splits} == {"train", "val", "test"}
    assert manifest.records[0].slide_id == "slide0"


@pytest.mark.parametrize("header", ["", "slide,class\n"])
def test_two_columns_are_slide_and_class(tmp_path, header):
    table = lay_out(tmp_path, header + "a.b.c,yes\nsub/d.SVS,no\n", "a.b.c.ndpi", "sub/d.SVS")
    manifest = run_import(table, table_format="simple")
    assert {slide.slide_id: slide.path.name for slide in manifest.records} == {
        "a.b.c": "a.b.c.ndpi",
        "d": "d.SVS",
    }


@pytest.mark.parametrize(
    "suffix", [".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".bif"]
)
def test_slides_of_every_format_are_found_below_the_folder(tmp_path, suffix):
    table = lay_out(tmp_path, "a,yes\n", f"deep/down/a{suffix}", "a.txt", "a/Slidedat.ini")
    assert run_import(table).records[0].path == tmp_path / f"slides/deep/down/a{suffix}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("test_001,Normal,None\n", "camelyon16"),
        ("test_001.tif,Normal\n", "camelyon16"),
        (PANDA, "panda"),
        ("case_id,slide_id,label\nc,s,l\n", "clam"),
        ("s1,l\n", "simple"),
        ("slide_id,label\ns1,l\n", "simple"),
    ],
)
def test_the_first_line_tells_the_format(tmp_path, content, expected):
    assert detect_format(lay_out(tmp_path, content)) == expected


def test_an_unknown_table_is_refused_with_the_known_ones(tmp_path):
    text = refusal(lay_out(tmp_path, "slide_id,age,sex\ns,3,f\n"))
    assert "its first line is 'slide_id,age,sex'" in text
    assert "camelyon16 (test_001,Tumor,…), panda" in text


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    text = refusal(lay_out(tmp_path, "a,b\n", "a.tif"), ConfigError, table_format="camelion16")
    assert "format=camelion16 is unknown; did you mean camelyon16?" in text
    assert "choose one of camelyon16, panda, panda_isup, clam, simple" in text


@pytest.mark.parametrize(
    ("table_format", "content", "expected"),
    [
        ("clam", "case_id,label\nc,l\n", "column slide_id is missing; the first line is case_id"),
        ("panda", "a,b\n", "column image_id, isup_grade is missing; the first line is a, b"),
        ("clam", "case_id,slide_id,label\nc,s\n", "row 2 has 2 cells, expected 3"),
        ("simple", "a,b,c\n", "row 1 has 3 cells, expected two, slide and class"),
        ("clam", "case_id,slide_id,label\n", "has no rows that name a slide"),
        ("simple", "", "is empty; expected a table of slides"),
        ("simple", "a.svs,x\nA/a.tif,y\n", "row 2 names A/a.tif, as row 1 does"),
    ],
)
def test_a_table_that_is_not_of_its_format_says_where(tmp_path, table_format, content, expected):
    assert expected in refusal(lay_out(tmp_path, content, "a.svs"), table_format=table_format)


def test_missing_slides_are_counted_and_listed(tmp_path):
    rows = "".join(f"s{i:02},x\n" for i in range(25))
    text = refusal(lay_out(tmp_path, rows + "here,y\n", "here.svs"))
    assert f"25 of 26 slides are not below {tmp_path / 'slides'}: s00, s01" in text
    assert "s19 and 5 more; looked for .svs, .tif" in text


def test_a_slide_with_two_files_is_told_apart_by_its_folder(tmp_path):
    files = ["one/a.svs", "two/a.svs"]
    text = refusal(lay_out(tmp_path, "a.svs,x\n", *files))
    assert "1 slides have several files" in text
    assert str(tmp_path / "slides/two/a.svs") in text
    named = lay_out(tmp_path, "two/a,x\n", *files)
    assert run_import(named).records[0].path == tmp_path / "slides/two/a.svs"


def test_the_slides_folder_must_be_there(tmp_path):
    assert "slides: is no folder" in refusal(lay_out(tmp_path, "a,x\n"))
