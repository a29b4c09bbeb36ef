import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data.labels import binary_labels, positive_class
from umtrain.data.manifest import Radiograph, Slide, read_manifest, write_manifest
from umtrain.errors import ConfigError, ManifestError

TEMPLATES = Path(__file__).parents[2] / "data_manifests"
SLIDES = "slide_id,patient_id,path,label,split\n"
RADIOGRAPHS = "image_id,patient_id,path,c7_x,c7_y,s1_x,s1_y,split,mm_per_px,facing\n"

# Whatever a file may hold: no half of a surrogate pair, and no spaces that reading strips; no
# control characters, and nothing that turns the direction of writing.
texts = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc"],
        exclude_characters="\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    ),
    min_size=1,
).filter(lambda text: text == text.strip())
ids = texts.filter(lambda text: text[0] not in "=+-@")
lengths = st.none() | st.floats(1e-6, 1e6)
digests = st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)
file_names = st.text(string.ascii_letters + ' ,"é漢', min_size=1).filter(
    lambda text: text == text.strip()
)
coordinates = st.floats(-1e5, 1e5)
splits = st.sampled_from(["train", "val", "test"])


def write(folder, content, name="m.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, kind="wsi", root=None):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, kind, root)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("manifests")


@given(
    rows=st.lists(
        st.tuples(ids, file_names, texts, splits, lengths, digests),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0],
    )
)
def test_any_slides_come_back_as_they_were_written(folder, rows):
    slides = [
        Slide(name, f"of {name}", folder / file, label, split, mpp, None, digest)
        for name, file, label, split, mpp, digest in rows
    ]
    write_manifest(folder / "slides.csv", "wsi", slides)
    assert list(read_manifest(folder / "slides.csv", "wsi").records) == slides


@given(
    name=ids,
    keypoints=st.tuples(coordinates, coordinates, coordinates, coordinates),
    split=splits,
    mm_per_px=lengths,
    facing=st.sampled_from([None, "left", "right"]),
)
def test_any_radiograph_comes_back_as_it_was_written(
    folder, name, keypoints, split, mm_per_px, facing
):
    outside = Path("/elsewhere/film.dcm")
    film = Radiograph(name, name, outside, *keypoints, split, mm_per_px, facing)
    write_manifest(folder / "films.csv", "spine", [film])
    assert read_manifest(folder / "films.csv", "spine").records == (film,)


def test_paths_start_from_the_manifest_or_from_the_root(tmp_path):
    path = write(tmp_path, SLIDES + "a,p,x/a.svs,1,train\nb,q,/far/b.svs,0,val\n")
    beside = read_manifest(path, "wsi")
    rooted = read_manifest(path, "wsi", "/images")
    assert [slide.path for slide in beside.records] == [tmp_path / "x/a.svs", Path("/far/b.svs")]
    assert [slide.path for slide in rooted.records] == [
        Path("/images/x/a.svs"),
        Path("/far/b.svs"),
    ]


def test_a_relative_path_stays_inside_the_root(tmp_path):
    inside = write(tmp_path, SLIDES + "a,p,x/../a.svs,1,train\n", "inside.csv")
    assert read_manifest(inside, "wsi").records[0].path == tmp_path / "a.svs"
    text = refusal(write(tmp_path, SLIDES + "a,p,x/../../a.svs,1,train\n"))
    assert "row 2, path: got 'x/../../a.svs'" in text
    assert f"expected a path inside {tmp_path}" in text
    assert "dataset.root" in text


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + SLIDES + "é,p,a.svs,1,train\n",
        (SLIDES + "é,p,a.svs,1,train\n").replace("\n", "\r\n"),
        SLIDES + "\n,,,,\né,p,a.svs,1,train\n\n",
        " slide_id , patient_id,path,label,split\n é ,p, a.svs ,1, train \n",
        "split,note,label,path,patient_id,slide_id\ntrain,old,1,a.svs,p,é\n",
    ],
    ids=["byte order mark", "CRLF", "blank rows", "spaces", "other columns and order"],
)
def test_what_spreadsheets_do_to_a_table_does_not_matter(tmp_path, content):
    slides = read_manifest(write(tmp_path, content), "wsi").records
    assert slides == (Slide("é", "p", tmp_path / "a.svs", "1", "train"),)


def test_rows_are_numbered_by_the_line_they_begin_on(tmp_path):
    content = SLIDES.strip() + ',note\na,p,a.svs,1,train,"two\nlines"\n\nb,q,b.svs,0,val,\n'
    manifest = read_manifest(write(tmp_path, content), "wsi")
    assert [slide.row for slide in manifest.records] == [2, 5]


def test_the_digest_is_that_of_the_file(tmp_path):
    path = write(tmp_path, SLIDES + "a,p,a.svs,1,train\n")
    before = read_manifest(path, "wsi").sha256
    write(tmp_path, SLIDES + "a,p,a.svs,0,train\n")
    assert len(before) == 64
    assert read_manifest(path, "wsi").sha256 != before


def test_split_and_classes_follow_the_rows(tmp_path):
    rows = "a,p,a.svs,x,train\nb,q,b.svs,y,val\nc,p,c.svs,y,train\n"
    manifest = read_manifest(write(tmp_path, SLIDES + rows), "wsi")
    assert [slide.id for slide in manifest.split("train")] == ["a", "c"]
    assert manifest.split("test") == ()
    assert manifest.classes == ("x", "y")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (",p,a.svs,1,train", "slide_id: got '', expected a text; fill the cell in"),
        ("a,,a.svs,1,train", "patient_id: got '', expected a text"),
        ("a,p,,1,train", "path: got '', expected the path of a file"),
        ("a,p,a.svs,,train", "label: got '', expected a text"),
        ("a,p,a.svs,1,Train", "split: got 'Train', expected train, val or test"),
        ("a,p,a.svs,1", "its cells: got 4, expected 5, as the header has"),
        ("a,p,a.svs,1,train,", "its cells: got 6, expected 5, as the header has"),
    ],
)
def test_a_bad_slide_row_is_named_with_what_to_write(tmp_path, row, expected):
    text = refusal(write(tmp_path, SLIDES + "z,z,z.svs,0,train\n" + row + "\n"))
    assert "m.csv: 1 problem(s) in 1 row(s)" in text
    assert f"row 3, {expected}" in text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a,p,a.dcm,nan,2,3,4,train,,", "c7_x: got 'nan', expected a number"),
        ("a,p,a.dcm,1,inf,3,4,train,,", "c7_y: got 'inf', expected a number"),
        ("a,p,a.dcm,1,2,1_0,4,train,,", "s1_x: got '1_0', expected a number"),
        ('a,p,a.dcm,1,2,3,"4,5",train,,', "s1_y: got '4,5', expected a number; write it with a"),
        ("a,p,a.dcm,1,2,3,1e999,train,,", "s1_y: got '1e999', expected a number"),
        ("a,p,a.dcm,1,2,3,4,train,0,", "mm_per_px: got '0', expected a number above 0"),
        ("a,p,a.dcm,1,2,3,4,train,-1,", "mm_per_px: got '-1', expected a number above 0"),
        ("a,p,a.dcm,1,2,3,4,train,,L", "facing: got 'L', expected left or right"),
    ],
)
def test_a_bad_radiograph_row_is_named_with_what_to_write(tmp_path, row, expected):
    assert f"row 2, {expected}" in refusal(write(tmp_path, RADIOGRAPHS + row + "\n"), "spine")


def test_a_digest_that_is_none_is_refused(tmp_path):
    content = SLIDES.replace("\n", ",sha256\n") + "a,p,a.svs,1,train,abc\n"
    text = refusal(write(tmp_path, content))
    assert "row 2, sha256: got 'abc', expected 64 hexadecimal digits" in text


def test_clashes_between_rows_name_both_rows(tmp_path):
    rows = "a,p,a.svs,1,train\na,q,b.svs,0,val\nc,p,c.svs,1,test\n"
    text = refusal(write(tmp_path, SLIDES + rows))
    assert "row 3, slide_id: got 'a', expected an id of its own (row 2 has this one)" in text
    assert "row 4, split: got 'test' for patient 'p', expected 'train' as in row 2" in text
    assert "keep all images of a patient in one split" in text


def test_all_bad_rows_are_counted_and_the_first_20_listed(tmp_path):
    rows = "".join(f"s{i},p{i},a.svs,,learn\n" for i in range(30))
    text = refusal(write(tmp_path, SLIDES + rows))
    assert "60 problem(s) in 30 row(s)" in text
    assert text.count("\n  row ") == 20
    assert text.endswith("and 40 more")


def test_missing_columns_are_named_with_what_is_like_them(tmp_path):
    text = refusal(write(tmp_path, "slide,patient_id,path,label\na,p,a.svs,1\n"))
    assert "missing slide_id (did you mean slide?), split;" in text
    assert "found slide, patient_id, path, label" in text
    assert "expected slide_id,patient_id,path,label,split[,mpp,mask,sha256]" in text


def test_an_optional_column_that_is_misspelt_is_not_ignored(tmp_path):
    content = RADIOGRAPHS.replace("mm_per_px", "mm_per_pixel") + "a,p,a.dcm,1,2,3,4,train,0.1,\n"
    text = refusal(write(tmp_path, content), "spine")
    assert "column mm_per_pixel is unknown but close to mm_per_px; rename it" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; expected slide_id,patient_id,path,label,split"),
        (SLIDES, "has a header but no rows; add one row per image"),
        (SLIDES.encode() + b"a,p,\xe9.svs,1,train\n", "line 2 has byte 0xe9, which is not UTF-8"),
        (SLIDES.encode("utf-16"), "is UTF-16; save the table again as 'CSV UTF-8'"),
        (SLIDES.replace(",", ";"), "has no commas"),
        (SLIDES.replace("label", "split"), "column split is there twice; remove one"),
        (SLIDES + '"a,p,a.svs,1,train\n', "row 2 is no CSV"),
        (SLIDES + f"{'x' * 200_000},p,a.svs,1,train\n", "row 2 is no CSV (field larger"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, content, expected):
    text = refusal(write(tmp_path, content))
    assert text.startswith(str(tmp_path / "m.csv"))
    assert expected in text


def test_a_manifest_that_is_not_there_is_named(tmp_path):
    assert "m.csv: the table cannot be read (No such file" in refusal(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("slide", "expected"),
    [
        (Slide(" a", "p", Path("/a.svs"), "1", "train"), "would be read back as"),
        (Slide("a", "p", Path("/x/../a.svs"), "1", "train"), "would be read back as"),
        (Slide("a", "p", Path("/a.svs"), "", "train"), "row 2, label: got ''"),
        (Slide("a", "p", Path("/\udcff.svs"), "1", "train"), "cannot be written as UTF-8"),
    ],
)
def test_what_would_not_be_read_back_is_not_written(tmp_path, slide, expected):
    write(tmp_path, "as it was")
    with pytest.raises(ManifestError) as caught:
        write_manifest(tmp_path / "m.csv", "wsi", [slide])
    assert expected in str(caught.value)
    assert (tmp_path / "m.csv").read_text() == "as it was"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_manifest_needs_a_folder_that_exists(tmp_path):
    slide = Slide("a", "p", tmp_path / "a.svs", "1", "train")
    with pytest.raises(ManifestError, match=r"cannot be written .* name a file in a folder"):
        write_manifest(tmp_path / "no" / "m.csv", "wsi", [slide])


@pytest.mark.parametrize(("name", "kind"), [("wsi", "wsi"), ("spine", "spine")])
def test_the_templates_are_valid_and_use_every_split(name, kind):
    manifest = read_manifest(TEMPLATES / f"{name}_template.csv", kind)
    assert {record.split for record in manifest.records} == {"train", "val", "test"}
    assert len((TEMPLATES / f"{name}_template.md").read_text().strip().splitlines()) == 1


def labelled(folder, *labels, split="train"):
    rows = [f"{i},{i},{i}.svs,{label},{split}\n" for i, label in enumerate(labels)]
    return read_manifest(write(folder, SLIDES + "".join(rows)), "wsi")


def test_of_two_classes_the_last_is_positive_unless_one_is_chosen(tmp_path):
    manifest = labelled(tmp_path, "b", "a", "b")
    assert binary_labels(manifest) == {"a": 0, "b": 1}
    assert binary_labels(manifest, "a") == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("classes", "positive"),
    [(("normal", "cancer"), "cancer"), (("Benign", "tumour"), "tumour"), (("0", "1"), "1")],
)
def test_a_class_named_for_no_finding_is_not_the_positive_one(tmp_path, classes, positive):
    assert positive_class(labelled(tmp_path, *classes), None) == positive


def test_of_several_classes_one_is_told_from_the_rest(tmp_path):
    manifest = labelled(tmp_path, "a", "b", "c")
    assert binary_labels(manifest, "b") == {"a": 0, "b": 1, "c": 0}
    with pytest.raises(ConfigError, match=r"3 classes \(a, b, c\).*dataset\.positive=CLASS"):
        positive_class(manifest, None)


def test_a_positive_class_must_be_a_class(tmp_path):
    manifest = labelled(tmp_path, "benign", "cancer")
    with pytest.raises(ConfigError, match=r"positive=cancre is no class .*did you mean cancer\?"):
        binary_labels(manifest, "cancre")


@pytest.mark.parametrize(
    ("labels", "split", "found"), [(["a", "a"], "train", "a"), (["a", "b"], "val", "no rows")]
)
def test_training_needs_both_classes(tmp_path, labels, split, found):
    manifest = labelled(tmp_path, *labels, split=split)
    with pytest.raises(ManifestError, match=f"the train split has {found}, expected"):
        binary_labels(manifest)


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "-1+1", "@SUM(A1)"])
def test_an_id_that_a_spreadsheet_would_calculate_is_refused(tmp_path, name):
    text = refusal(write(tmp_path, SLIDES + f'"{name}",p,a.svs,1,train\n'))
    assert f"row 2, slide_id: got {name!r}, expected an id that no spreadsheet takes for a" in text
    assert "begin it with a letter or a digit" in text


def test_a_negative_number_is_an_id(tmp_path):
    manifest = read_manifest(write(tmp_path, SLIDES + "-12,p,a.svs,-1,train\n"), "wsi")
    assert (manifest.records[0].id, manifest.records[0].label) == ("-12", "-1")


@pytest.mark.parametrize("mark", ["\x1b[2J", "\u202e", "\n", "\x7f"])
def test_text_that_steers_a_terminal_is_refused_and_shown_escaped(tmp_path, mark):
    text = refusal(write(tmp_path, SLIDES + f'"a{mark}b",p,a.svs,1,train\n'))
    assert "expected a text without control characters" in text
    assert mark not in text.splitlines()[1]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-16", "is UTF-16; save the table again as 'CSV UTF-8'"),
        ("utf-16-le", "line 1 has a NUL byte: it is UTF-16, or no text"),
        ("latin-1", "line 2 has byte 0xfc, which is not UTF-8 (as in Latin-1 or Windows-1252)"),
    ],
)
def test_another_encoding_is_refused_by_its_name(tmp_path, encoding, expected):
    content = (SLIDES + "a,Müller,a.svs,1,train\n").encode(encoding)
    assert expected in refusal(write(tmp_path, content))


def test_a_long_cell_is_cut_in_the_message(tmp_path):
    text = refusal(write(tmp_path, SLIDES + f"={'x' * 100_000},p,a.svs,1,train\n"))
    assert len(text) < 500
