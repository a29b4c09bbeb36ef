"""`umtrain report` as a user runs it, on a run that umtrain itself has made."""

import json
import shutil

import pytest

from umtrain.cli import main


@pytest.fixture(scope="module")
def folder(slides, umtrain, tmp_path_factory):
    """A folder with a run and a copy of it as the jobs of a sweep, `out`; the images are gone."""
    folder = tmp_path_factory.mktemp("report")
    data = shutil.copytree(slides.parent, folder / "data")
    done = umtrain(
        *("fit", "model=resnet18", "res=64", "epochs=1", "max_steps=1", "precision=fp32"),
        *("dataset.workers=0", f"dataset.manifest={data / slides.name}", "run_dir=out/seed-0"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "report   out/seed-0/report.html" in done.stdout
    shutil.rmtree(data)
    shutil.copytree(folder / "out" / "seed-0", folder / "out" / "seed-1")
    record = json.loads((folder / "out" / "seed-0" / "metrics.json").read_text())
    records = [{**record, "axes": {"seed": seed}} for seed in ("0", "1")]
    (folder / "out" / "summary.json").write_text(json.dumps(records))
    return folder


def test_a_runs_page_is_made_again_without_the_images(folder, umtrain):
    page = folder / "out" / "seed-0" / "report.html"
    before = page.read_text()
    page.unlink()
    done = umtrain("report", "out/seed-0", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "report   out/seed-0/report.html" in done.stdout
    assert page.read_text() == before
    assert "Picture of slide_" in before


def test_the_sweeps_page_leads_to_those_of_its_jobs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["report", "out"]) == 0
    assert "report   out/report.html" in capsys.readouterr().out
    text = (folder / "out" / "report.html").read_text()
    for job in ("seed-0", "seed-1"):
        assert f'href="{job}/report.html"' in text


def test_a_run_and_its_copy_do_not_differ(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["report", "out/seed-0", "out/seed-1", "out=both"]) == 0
    assert "On the same 2 test slides, AUC: A" in capsys.readouterr().out
    found = json.loads((folder / "both" / "comparison.json").read_text())
    assert found["tests"][0]["difference"] == 0
    assert len(found["cases"]) > 0
    assert "Comparison of 2 runs" in (folder / "both" / "report.html").read_text()
