"""`umtrain sweep` as a user runs it."""

import csv
import json

import pytest

from umtrain.sweep import plan_jobs


@pytest.fixture(scope="module")
def swept(slides, umtrain, tmp_path_factory):
    """A sweep in which one job runs out of memory, and the arguments that ran it."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = (
        *("sweep", "model=resnet18", "res=64,1024", "epochs=1", "max_steps=4", "precision=fp32"),
        *("dataset.workers=0", "memory=vanilla", "memory.device_budget=300MiB"),
        *(f"dataset.manifest={slides}", "run_dir='a sweep'"),
    )
    done = umtrain(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, arguments, done.stdout


def test_a_quoted_folder_is_the_folder(swept):
    folder, _, _ = swept
    assert [path.name for path in folder.iterdir()] == ["a sweep"]


def test_a_job_that_does_not_fit_is_a_row_not_an_end(swept):
    folder, _, printed = swept
    with (folder / "a sweep" / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["res"], row["status"]) for row in rows] == [("64", "ok"), ("1024", "oom")]
    assert float(rows[0]["images_per_s_mean"]) > 0
    assert rows[1]["images_per_s_mean"] == ""
    assert "OOM" in printed
    assert (folder / "a sweep" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_holds_the_jobs_own_records(swept):
    folder, _, _ = swept
    summary = json.loads((folder / "a sweep" / "summary.json").read_text())
    job = json.loads((folder / "a sweep" / "res-64" / "metrics.json").read_text())
    assert summary[0] == {**job, "axes": {"res": "64"}}


def test_a_rerun_keeps_finished_jobs(swept, umtrain):
    folder, arguments, _ = swept
    record = folder / "a sweep" / "res-64" / "metrics.json"
    written = record.stat().st_mtime_ns
    done = umtrain(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, kept") == 2
    assert record.stat().st_mtime_ns == written


def test_jobs_that_a_cluster_runs_are_rows_of_the_same_table(slides, umtrain, tmp_path):
    done = umtrain(
        *("sweep", "seed=0,1", "model=resnet18", "res=64", "epochs=1", "max_steps=1", "cases=0"),
        *("launcher=slurm", "launcher.cluster=local", "launcher.ranks=1"),
        *("launcher.gpus_per_node=0", "dataset.workers=0"),
        *(f"dataset.manifest={slides}", "memory=vanilla", "run_dir=out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [(row["axes"]["seed"], row["status"]) for row in summary] == [("0", "ok"), ("1", "ok")]
    assert done.stdout.count("submitted as") == 2


def test_a_wrong_job_stops_the_sweep_before_the_first_one_starts(slides, umtrain, tmp_path):
    done = umtrain("sweep", "res=64,32", f"dataset.manifest={slides}", cwd=tmp_path)
    assert done.returncode == 2
    assert "res=32: must be at least 64" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_fit_with_several_values_names_sweep(umtrain, tmp_path):
    done = umtrain("fit", "res=256,512", cwd=tmp_path)
    assert done.returncode == 2
    assert "umtrain sweep res=256,512" in done.stderr


def test_jobs_of_other_settings_are_not_mistaken_for_finished_ones(swept, umtrain):
    folder, arguments, _ = swept
    done = umtrain(*arguments, "seed=7", "optim.lr=0.5", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "finished before" not in done.stdout
    assert json.loads((folder / "a sweep" / "res-64" / "metrics.json").read_text())["seed"] == 7
    assert (folder / "a sweep" / "res-64.unfinished-1" / "metrics.json").exists()


def test_every_job_has_a_folder_of_its_own_and_quotes_are_no_part_of_it(slides, tmp_path):
    axes = {"memory.spill_dir": ["a/m", "a-m", "x" * 300]}
    jobs = plan_jobs(axes, [f"dataset.manifest={slides}"], tmp_path)
    names = [job.run_dir.name for job in jobs]
    assert len(set(names)) == 3
    assert max(map(len, names)) < 200
