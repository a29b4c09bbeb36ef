import csv
import shutil

import numpy as np
import pytest
import tifffile

from umtrain.data.check import check_manifest
from umtrain.data.synthetic.radiographs import make_radiographs
from umtrain.data.synthetic.slides import make_slides
from umtrain.errors import ManifestError


class Table:
    """A manifest on disk whose rows a test can change."""

    def __init__(self, path):
        self.path = path
        with path.open(newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))

    def file(self, at):
        return self.path.parent / self.rows[at]["path"]

    def save(self):
        columns = self.rows[0].keys()
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        return self.path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    make_slides(folder / "wsi", 6, 256, 0)
    (folder / "spine").mkdir()
    make_radiographs(folder / "spine", 6, 200, 0)
    return folder


@pytest.fixture
def slides(originals, tmp_path):
    shutil.copytree(originals / "wsi", tmp_path / "wsi")
    return Table(tmp_path / "wsi/manifest.csv")


@pytest.fixture
def films(originals, tmp_path):
    shutil.copytree(originals / "spine", tmp_path / "spine")
    return Table(tmp_path / "spine/manifest.csv")


def problems(table, kind, **options):
    """The (row, what) of each problem; a row is the line it begins on, the first being 2."""
    report = check_manifest(table.save(), kind, workers=1, **options)
    assert report.n_rows == len(table.rows)
    assert report.ok == (not report.problems)
    assert all(problem.fix for problem in report.problems)
    return [(problem.row, problem.what) for problem in report.problems]


def test_good_data_has_no_problems_and_progress_counts_its_files(slides, films):
    seen = []
    assert problems(slides, "wsi", progress=lambda *counts: seen.append(counts)) == []
    assert problems(films, "spine") == []
    assert seen == [(n, 6) for n in range(1, 7)]


def test_every_problem_of_a_slide_table_is_a_row(slides):
    for row in slides.rows:
        row["sha256"] = ""
    slides.file(0).unlink()
    slides.file(1).write_bytes(b"no slide")
    content = slides.file(2).read_bytes()
    slides.file(2).write_bytes(content[: len(content) // 2])
    shutil.copy(slides.file(4), slides.file(5))
    slides.rows[3]["label"] = ""
    found = problems(slides, "wsi")
    by_row = {row: what for row, what in found if row is not None}
    assert by_row[2] == "missing file"
    assert "OpenSlide" in by_row[3]
    assert "OpenSlide" in by_row[4]
    assert by_row[5] == "label: got '', expected a text"
    assert by_row[7].startswith("duplicate content: row 6 (slide_0004) has the same")


def test_clashing_rows_are_found_and_their_files_opened_too(slides):
    slides.rows[1]["slide_id"] = slides.rows[0]["slide_id"]
    slides.rows[4]["patient_id"] = slides.rows[0]["patient_id"]
    slides.rows[4]["path"] = slides.rows[0]["path"]
    slides.rows[4]["sha256"] = ""
    whats = [what for row, what in problems(slides, "wsi") if row in (3, 6)]
    assert whats[0].startswith("slide_id: got 'slide_0000', expected an id of its own (row 2")
    assert whats[1].startswith("split: got 'test' for patient 'patient_0000', expected 'train'")
    assert whats[2] == "duplicate file: row 2 (slide_0000) has the same, there in split train"


def test_a_link_to_a_file_is_that_file(slides):
    slides.file(1).unlink()
    slides.file(1).symlink_to(slides.file(0))
    slides.rows[1]["sha256"] = ""
    assert (3, "duplicate file: row 2 (slide_0000) has the same") in problems(slides, "wsi")


def test_a_changed_file_has_another_digest_than_the_manifest(slides):
    slides.rows[0]["sha256"] = "0" * 64
    ((row, what),) = problems(slides, "wsi")
    assert row == 2
    assert what.startswith("sha256: got ")
    assert what.endswith(f"from the file, expected {'0' * 64}")


def test_a_missing_mask_is_told_apart_from_a_missing_file(slides):
    (slides.path.parent / slides.rows[0]["mask"]).unlink()
    assert problems(slides, "wsi") == [(2, "missing mask")]


def test_mpp_is_only_missed_where_it_is_needed(slides):
    for row in slides.rows:
        row["sha256"] = row["mpp"] = ""
    tifffile.imwrite(
        slides.file(0), np.full((256, 256, 3), 200, np.uint8), tile=(256, 256), photometric="rgb"
    )
    assert problems(slides, "wsi") == []
    whats = [(2, "no mpp: neither the file nor the manifest has it")]
    assert problems(slides, "wsi", needs_mpp=True) == whats
    slides.rows[0]["mpp"] = "0.5"
    assert problems(slides, "wsi", needs_mpp=True) == []


def test_splits_that_lack_rows_or_a_class_are_problems_of_the_table(slides):
    for row in slides.rows:
        row["split"] = {"train": "train", "val": "train", "test": "test"}[row["split"]]
        row["label"] = "1" if row["split"] == "test" else row["label"]
    assert problems(slides, "wsi") == [
        (None, "no rows in split val"),
        (None, "class 0 is missing in split test"),
    ]


def test_every_problem_of_a_radiograph_table_is_a_row(films):
    for row in films.rows:
        row["sha256"] = ""
    films.rows[0]["c7_x"] = "100000"
    films.rows[1]["s1_y"] = "-0.51"
    films.rows[2]["facing"] = "up"
    films.file(3).write_bytes(films.file(3).read_bytes()[:-5000])
    films.rows[4]["path"] = "images/none.dcm"
    by_row = {row: what for row, what in problems(films, "spine") if row is not None}
    assert by_row[2].startswith("c7 is at (100000, ")
    assert "outside the image of" in by_row[2]
    assert by_row[3].startswith("s1 is at (")
    assert by_row[4] == "facing: got 'up', expected left or right"
    assert "damaged or truncated" in by_row[5]
    assert by_row[6] == "missing file"


def test_a_keypoint_on_the_outermost_pixel_is_inside(films):
    films.rows[0]["c7_x"] = films.rows[0]["c7_y"] = "-0.5"
    assert problems(films, "spine") == []


def test_a_radiograph_without_any_spacing_is_a_problem(films):
    stated = [at for at, row in enumerate(films.rows) if row["mm_per_px"]]
    assert stated, "the generator leaves the spacing of some films to the manifest"
    films.rows[stated[0]]["mm_per_px"] = ""
    ((row, what),) = problems(films, "spine")
    assert row == stated[0] + 2
    assert what.startswith("no pixel spacing")


def test_a_table_that_cannot_be_read_at_all_is_an_error(tmp_path):
    (tmp_path / "m.csv").write_text("a,b\n")
    with pytest.raises(ManifestError, match="missing slide_id"):
        check_manifest(tmp_path / "m.csv", "wsi")
