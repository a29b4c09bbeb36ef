"""`umtrain report` over several runs: what is compared, and what is refused."""

import csv
import json

import pytest
import yaml

from umtrain.cli import main
from umtrain.config import config_to_dict, load_config
from umtrain.evaluation.comparison import paired_auc_test, paired_error_test
from umtrain.report.record import read_record


def report(*words):
    return main(["report", *map(str, words)])


@pytest.fixture
def pair(runs, tmp_path):
    """Two runs on the same 40 slides, the second one less skilled."""
    first = runs.slides(tmp_path / "first", seed=1, n=40, skill=2.5, annotation="masks")
    return first, runs.slides(tmp_path / "second", seed=2, n=40, skill=0.3)


@pytest.fixture(scope="module")
def both(runs, tmp_path_factory):
    """The folder of such a comparison, for reading."""
    folder = tmp_path_factory.mktemp("both")
    first = runs.slides(folder / "first", seed=1, n=40, skill=2.5, annotation="masks")
    second = runs.slides(folder / "second", seed=2, n=40, skill=0.3)
    assert report(first, second, f"out={folder / 'out'}") == 0
    return folder / "out"


def compared(folder):
    return json.loads((folder / "comparison.json").read_text())


def edit_predictions(run_dir, change):
    path = run_dir / "predictions.csv"
    with path.open(newline="") as stream:
        rows = [changed for row in csv.DictReader(stream) if (changed := change(row))]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_two_runs_are_tested_on_the_slides_that_they_share(runs, pair, tmp_path, capsys):
    assert report(*pair, f"out={tmp_path / 'out'}") == 0
    found = compared(tmp_path / "out")
    one, other = runs.slide_predictions(40, 1, 2.5), runs.slide_predictions(40, 2, 0.3)
    labels = [row["label"] for row in one]
    expected = paired_auc_test(labels, [r["prob"] for r in other], [r["prob"] for r in one])
    assert found["tests"] == [{"run": "B", "against": "A", **expected}]
    assert (found["split"], found["n_shared"]) == ("test", 40)
    assert found["runs"][0]["shared"]["auc"] == pytest.approx(expected["auc_b"])
    assert "B is worse" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.json", "report.html", "roc.png", "pr.png", "pairs_B.png"}


def test_radiographs_are_tested_by_their_errors(runs, tmp_path):
    first = runs.films(tmp_path / "first", seed=1)
    second = runs.films(tmp_path / "second", seed=2, spread_mm=5.0)
    assert report(first, second, f"out={tmp_path / 'out'}") == 0
    found = compared(tmp_path / "out")
    errors = [
        [abs(r["sva_pred_mm"] - r["sva_true_mm"]) for r in runs.film_predictions(34, seed, mm)]
        for seed, mm in ((2, 5.0), (1, 2.0))
    ]
    assert found["tests"][0] == {"run": "B", "against": "A"} | paired_error_test(*errors)
    assert found["runs"][0]["shared"]["n_patients"] is None
    assert any("manifest is not there any more" in caution for caution in found["cautions"])
    assert found["runs"][0]["shared"]["mae_mm"] == pytest.approx(
        read_record(first)["test"]["mae_mm"]
    )


def test_films_of_one_patient_are_drawn_together(runs, tmp_path):
    first = runs.films(tmp_path / "first", seed=1)
    second = runs.films(tmp_path / "second", seed=2, spread_mm=5.0)
    ids = [row["id"] for row in runs.film_predictions(34, 1, 2.0)]
    header = "image_id,patient_id,path,c7_x,c7_y,s1_x,s1_y,split\n"
    rows = [f"{name},P{at // 2},{name}.dcm,1,1,2,2,test\n" for at, name in enumerate(ids)]
    (tmp_path / "films.csv").write_text(header + "".join(rows))
    for run_dir in (first, second):
        config = load_config(["dataset=spine", f"dataset.manifest={tmp_path / 'films.csv'}"])
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    assert report(first, second, f"out={tmp_path / 'out'}") == 0
    found = compared(tmp_path / "out")
    assert found["runs"][0]["shared"]["n_patients"] == 17
    assert not any("manifest is not there" in caution for caution in found["cautions"])


def test_images_of_one_run_alone_are_left_out_and_counted(pair, tmp_path):
    edit_predictions(pair[1], lambda row: None if row["id"] < "slide_0010" else row)
    assert report(*pair, f"out={tmp_path / 'out'}") == 0
    found = compared(tmp_path / "out")
    assert found["n_shared"] == 30
    assert "predictions: A 40, B 30" in " ".join(found["cautions"])


def test_slides_on_which_the_runs_differ_most_come_first(pair, tmp_path):
    assert report(*pair, f"out={tmp_path / 'out'}") == 0
    spreads = [
        abs(one["probs"][0] - one["probs"][1]) for one in compared(tmp_path / "out")["images"]
    ]
    assert spreads == sorted(spreads, reverse=True)


def test_the_same_case_stands_side_by_side(both):
    cases = compared(both)["cases"]
    assert [case["id"] for case in cases] == ["slide_0000", "slide_0001", "slide_0002"]
    assert [picture["run"] for picture in cases[0]["pictures"]] == ["A", "B"]
    text = (both / "report.html").read_text()
    assert text.count("the worst false negative") == 6
    assert 'href="../first/cases/test-slide_0000.png"' in text


def test_without_a_case_in_common_the_page_says_why(runs, tmp_path):
    one = runs.slides(tmp_path / "one", n_cases=0)
    other = runs.slides(tmp_path / "other", seed=1)
    assert report(one, other, f"out={tmp_path / 'out'}") == 0
    assert "no case pictures in the record of A" in (tmp_path / "out/report.html").read_text()


def test_other_manifests_and_machines_are_pointed_out(runs, pair, tmp_path):
    record = read_record(pair[1])
    record["data"]["manifest_sha256"] = "ef" * 32
    record["environment"]["device_name"] = "another"
    (pair[1] / "metrics.json").write_text(json.dumps(record))
    assert report(*pair, f"out={tmp_path / 'out'}") == 0
    told = " ".join(compared(tmp_path / "out")["cautions"])
    assert "another run trained on" in told
    assert "times do not compare" in told


def test_annotation_is_what_the_record_says_or_not_known(both):
    assert [run["annotation"] for run in compared(both)["runs"]] == ["masks", None]
    text = (both / "report.html").read_text()
    assert "masks" in text
    assert "not in the record" in text


def test_a_comparison_without_a_name_lands_in_runs(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report("first", "second") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("comparison-")
    assert (folder / "report.html").exists()


def refused(capsys, *words):
    assert report(*words) == 2
    return capsys.readouterr().err


def test_slides_and_radiographs_do_not_compare(runs, tmp_path, capsys):
    slides, films = runs.slides(tmp_path / "slides"), runs.films(tmp_path / "films")
    told = refused(capsys, slides, films, f"out={tmp_path / 'out'}")
    assert "films is a run on dataset=spine" in told
    assert not (tmp_path / "out").exists()


def test_runs_without_a_shared_image_do_not_compare(pair, capsys):
    edit_predictions(pair[1], lambda row: row | {"id": f"x{row['id']}"})
    told = refused(capsys, *pair)
    assert "no image of split test is in all runs" in told
    assert "xslide_0000" in told


def test_two_truths_for_one_image_are_refused(pair, capsys):
    edit_predictions(
        pair[1],
        lambda row: row | {"label": 1 - int(row["label"])} if row["id"] == "slide_0003" else row,
    )
    assert "slide_0003: label is" in refused(capsys, *pair)


def test_other_true_keypoints_are_refused_but_not_their_rounding(runs, tmp_path, capsys):
    first, second = (runs.films(tmp_path / name, seed=1) for name in ("first", "second"))
    shifted = [0.001]

    def shift(row):
        return row | {"sva_true_mm": float(row["sva_true_mm"]) + shifted[0]}

    edit_predictions(second, shift)
    assert report(first, second, f"out={tmp_path / 'out'}") == 0
    shifted[0] = 1.0
    edit_predictions(second, shift)
    assert "film_0000: sva_true_mm is" in refused(capsys, first, second)


def test_runs_without_predictions_of_a_common_split_are_named(pair, capsys):
    edit_predictions(pair[1], lambda row: row | {"split": "val"})
    told = refused(capsys, *pair)
    assert "first: test" in told
    assert "second: val" in told
    assert "umtrain eval run=DIR split=test" in told


def test_a_run_named_twice_is_refused(pair, capsys):
    assert "is named twice" in refused(capsys, pair[0], pair[0])


def test_a_sweep_among_runs_is_refused_with_a_run_of_it(runs, pair, tmp_path, capsys):
    swept = runs.sweep(tmp_path / "sweep")
    assert "sweep/res-" in refused(capsys, pair[0], swept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "umtrain report takes a run directory"),
        (["nowhere"], "no such file; is nowhere a run"),
        (["nowhere", "out=x"], "out=x: a run's page lies in the run"),
        (["a", "outt=x"], "Did you mean out=?"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_named(pair, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file: cannot be made" in refused(capsys, *pair, f"out={tmp_path / 'file'}")


def test_out_never_replaces_the_page_of_a_run(pair, capsys):
    assert "is a run or a sweep" in refused(capsys, *pair, f"out={pair[0]}")


def test_a_run_is_made_again_from_its_files_alone(pair, capsys):
    run_dir = pair[0]
    assert report(run_dir) == 0
    first = (run_dir / "report.html").read_text()
    assert str(run_dir / "report.html") in capsys.readouterr().out
    before = (run_dir / "metrics.json").read_bytes()
    (run_dir / "report.html").unlink()
    assert report(run_dir) == 0
    assert (run_dir / "report.html").read_text() == first
    assert (run_dir / "metrics.json").read_bytes() == before
