"""`umtrain report` as a user runs it, on runs that umtrain itself has made."""

import json

import pytest


@pytest.fixture(scope="module")
def swept(slides, umtrain, tmp_path_factory):
    """The folder above a sweep of two seeds, `out`."""
    folder = tmp_path_factory.mktemp("report")
    done = umtrain(
        *("sweep", "seed=0,1", "res=64", "epochs=1", "max_steps=1", "precision=fp32"),
        *("dataset.workers=0", f"dataset.manifest={slides}", "run_dir=out"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "report   out/report.html" in done.stdout
    return folder


def test_the_sweeps_page_leads_to_those_of_its_jobs(swept):
    text = (swept / "out" / "report.html").read_text()
    for job in ("seed-0", "seed-1"):
        assert f'href="{job}/report.html"' in text
        assert (swept / "out" / job / "report.html").exists()


@pytest.mark.parametrize("path", ["out", "out/seed-0"])
def test_a_page_is_made_again(swept, umtrain, path):
    page = swept / path / "report.html"
    before = page.read_text()
    page.unlink()
    done = umtrain("report", path, cwd=swept)
    assert done.returncode == 0, done.stderr
    assert f"report   {path}/report.html" in done.stdout
    assert page.read_text() == before


def test_runs_are_compared_without_the_images(swept, umtrain):
    done = umtrain("report", "out/seed-0", "out/seed-1", "out=both", cwd=swept)
    assert done.returncode == 0, done.stderr
    assert "On the same 2 test slides, AUC: A" in done.stdout
    found = json.loads((swept / "both" / "comparison.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert "Comparison of 2 runs" in (swept / "both" / "report.html").read_text()
