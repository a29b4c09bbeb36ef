"""`umtrain data make` and `umtrain data check` as a user runs them."""

import csv
import hashlib

from umtrain.cli import main


def _digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(tmp_path, capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = f"out={tmp_path / name}"
        assert main(["data", "make", "dataset=wsi", "n=2", "size=256", f"seed={seed}", out]) == 0
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert _digests(tmp_path / "a") != _digests(tmp_path / "c")


def test_what_is_made_passes_its_own_check(slides, radiographs, capsys):
    assert main(["data", "check", str(slides), "fit=pad"]) == 0
    assert main(["data", "check", str(radiographs)]) == 0
    assert "every file opens, nothing wrong" in capsys.readouterr().out


def test_volumes_are_made_in_both_formats_and_pass_their_own_check(volumes, capsys):
    kinds = {path.suffix for path in (volumes.parent / "volumes").iterdir()}
    assert kinds == {"", ".gz"}
    assert main(["data", "check", str(volumes)]) == 0
    assert "8 rows, every file opens, nothing wrong" in capsys.readouterr().out


def test_check_names_the_row_and_ends_with_2(slides, tmp_path, capsys):
    with slides.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["path"] = str(slides.parent / row["path"])
        row["mask"] = ""
    rows[1]["path"] = "gone.tif"
    manifest = tmp_path / "broken.csv"
    with manifest.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert main(["data", "check", str(manifest)]) == 2
    printed = capsys.readouterr().out
    assert rows[1]["slide_id"] in printed
    assert "1 problem in 8 rows" in printed


def test_make_never_touches_a_folder_that_is_there(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["data", "make", f"out={tmp_path / 'mine'}"]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
