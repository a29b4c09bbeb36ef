"""What a sweep keeps, goes on with or sets aside of what earlier sweeps left in its folder."""

import dataclasses
import sys
from hashlib import sha256

import pytest

from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.demo import demo_spec
from umtrain.errors import RunError
from umtrain.files import write_json
from umtrain.job import finished, is_unfinished, record_after, record_stamp, set_aside
from umtrain.lock import run_lock
from umtrain.report.record import _KEYS, RECORD_NAME, UNDER_WAY
from umtrain.run_dir import write_config
from umtrain.submission import LauncherConfig
from umtrain.sweep import STAMPS, _on_cluster, _run_job, plan_jobs

FREE = ("device=cpu", "precision=fp32", "dataset.positive=cancer")


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "slides.csv"
    path.write_text("id\n")
    return path


def job(folder, *words):
    """The job of a sweep in the folder that `words` fix."""
    [only] = plan_jobs({"res": ["64"]}, list(words), folder)
    return only


def leave_run(a_job, *words, status="ok", digest="0", why=""):
    """Leave in the job's folder what a run with `words` leaves there."""
    a_job.run_dir.mkdir(exist_ok=True)
    write_config(a_job.run_dir, load_config(["res=64", *FREE, *words]))
    record = dict.fromkeys(_KEYS) | {"status": status, "data": {"manifest_sha256": digest}}
    record["reasons"] = {"status": why} if why else {}
    write_json(a_job.run_dir / RECORD_NAME, record)


def leave_run_on(manifest, a_job, *words, status="ok"):
    digest = sha256(manifest.read_bytes()).hexdigest()
    leave_run(a_job, f"dataset.manifest={manifest}", *words, status=status, digest=digest)


@pytest.mark.parametrize("free", [*FREE, "signal_grace_s=9", "resume=never", "run_dir=elsewhere"])
def test_what_was_left_to_a_run_makes_no_other_job_of_it(free, manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run_on(manifest, a_job, free)
    assert finished(a_job)["status"] == "ok"
    assert is_unfinished(a_job)


@pytest.mark.parametrize(
    "changed",
    [
        *("max_steps=5", "memory.device_budget=2GiB", "optim.clip_norm=1.0"),
        *("memory.group_bytes=1MiB", "model.pool=max", "dataset.root=."),
        *("seed=1", "memory=lms"),
    ],
)
def test_a_run_with_a_limit_is_not_the_job_without_it(changed, manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run_on(manifest, a_job, changed)
    assert finished(a_job) is None
    assert not is_unfinished(a_job)


def test_a_run_with_an_mpp_is_not_the_job_at_another_one(manifest, tmp_path):
    pad = ("dataset.fit=pad", "dataset.mpp=2.0")
    a_job = job(tmp_path, f"dataset.manifest={manifest}", "dataset.fit=pad", "dataset.mpp=1.0")
    leave_run_on(manifest, a_job, *pad)
    assert finished(a_job) is None


def test_a_run_with_pretrained_weights_is_not_the_job_without(manifest, tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run_on(manifest, a_job, f"model.pretrained={weights}")
    assert finished(a_job) is None


def test_a_strategy_left_open_is_not_one_that_was_chosen(manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}", "memory=auto")
    leave_run_on(manifest, a_job, "memory=vanilla")
    assert finished(a_job) is None


def test_a_job_without_a_manifest_is_one_on_the_demo_data_of_its_size(manifest, tmp_path):
    a_job = job(tmp_path)
    demo = tmp_path / demo_spec("wsi", 64).folder_name / "manifest.csv"
    demo.parent.mkdir()
    demo.write_text("id\n")
    leave_run_on(demo, a_job)
    assert finished(a_job) is not None
    leave_run_on(manifest, a_job)
    assert finished(a_job) is None


def test_a_run_on_a_manifest_that_has_gone_or_changed_is_not_the_job(manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run_on(manifest, a_job)
    manifest.write_text("id\nother\n")
    assert finished(a_job) is None
    manifest.unlink()
    assert finished(a_job) is None
    assert not is_unfinished(a_job)


def test_what_is_set_aside_is_whole_and_no_longer_locked(manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run(a_job)
    set_aside(a_job.run_dir)
    aside = tmp_path / "res-64.unfinished-1"
    assert sorted(path.name for path in aside.iterdir()) == ["config.yaml", RECORD_NAME]
    assert not a_job.run_dir.exists()


def test_a_folder_that_a_process_is_at_work_in_stays_where_it_is(manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}", "seed=1")
    leave_run_on(manifest, a_job)
    with run_lock(a_job.run_dir):
        with pytest.raises(RunError, match="in use by process"):
            set_aside(a_job.run_dir)
        record = _run_job(a_job, display=None)
        assert (a_job.run_dir / RECORD_NAME).exists()
    assert record["status"] == "failed"
    assert "in use by process" in record["reasons"]["status"]
    assert [path.name for path in tmp_path.glob("res-64*")] == ["res-64"]


@pytest.mark.parametrize("code", [1, None])
def test_a_job_that_ended_badly_is_not_told_by_the_record_before(code, manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run(a_job, status="interrupted")
    row = record_after(a_job, record_stamp(a_job), code, "node lost")
    assert row["status"] == "failed"
    assert row["reasons"]["status"].endswith("before it wrote a record: node lost")
    assert record_after(a_job, None, code, "")["status"] == "interrupted"


@pytest.mark.parametrize("code", [1, None])
def test_a_job_that_left_its_record_under_way_was_lost(code, manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run(a_job, status="interrupted", why=UNDER_WAY)
    row = record_after(a_job, None, code, "node lost")
    assert row["status"] == "failed"
    assert row["reasons"]["status"].endswith("before it wrote a record: node lost")


def test_a_killed_job_is_told_by_its_signal(manifest, tmp_path):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run(a_job)
    assert "ended by signal 9" in record_after(a_job, None, -9, "")["reasons"]["status"]


@pytest.fixture
def on_cluster(tmp_path, monkeypatch):
    """Run jobs, whose commands fail at once, on submitit's own executor; return their rows."""
    failing = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr("umtrain.sweep.command_of_ranks", lambda *_: failing)
    launcher = LauncherConfig("slurm", cluster="local", timeout_min=5, signal_before_s=10)
    return lambda *jobs: dict(_on_cluster(launcher, tmp_path, [*jobs], None, Console()))


def test_a_cluster_job_that_fails_is_not_told_by_the_record_before(manifest, tmp_path, on_cluster):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run_on(manifest, a_job, status="interrupted")
    row = on_cluster(a_job)[0]
    assert row["status"] == "failed"
    assert "ended by exit code 1" in row["reasons"]["status"]


def test_a_cluster_job_whose_folder_is_in_use_is_a_row(manifest, tmp_path, on_cluster):
    busy = job(tmp_path, f"dataset.manifest={manifest}", "seed=1")
    leave_run_on(manifest, busy)
    free = dataclasses.replace(busy, run_dir=tmp_path / "free")
    with run_lock(busy.run_dir):
        rows = on_cluster(busy, free)
    assert "in use by process" in rows[0]["reasons"]["status"]
    assert "ended by exit code 1" in rows[1]["reasons"]["status"]


def test_a_record_written_since_an_earlier_sweep_submitted_the_job_is_its_own(
    manifest, tmp_path, on_cluster, monkeypatch
):
    a_job = job(tmp_path, f"dataset.manifest={manifest}")
    leave_run_on(manifest, a_job, status="interrupted")
    write_json(tmp_path / STAMPS, {a_job.run_dir.name: 1})
    monkeypatch.setattr("umtrain.sweep.Submitter.is_queued", lambda *_: True)
    assert on_cluster(a_job)[0]["status"] == "interrupted"
