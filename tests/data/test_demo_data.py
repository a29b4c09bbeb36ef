import fcntl
import json
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.data import demo
from umtrain.data.demo import DemoSpec, cache_folder, demo_manifest, demo_spec, ensure_demo
from umtrain.data.manifest import read_manifest
from umtrain.data.synthetic.radiographs import plan_radiographs
from umtrain.errors import DataError

# One image is made without further processes, which keeps these tests quick.
SPEC = DemoSpec("spine", 1, 100)


def entries(folder):
    """What lies in the cache besides the lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.fixture
def said():
    return []


@pytest.fixture
def made(tmp_path, said):
    """A cache with the data of SPEC."""
    ensure_demo(SPEC, tmp_path, said.append)
    said.clear()
    return tmp_path


def test_the_data_is_made_once_and_then_used(tmp_path, said):
    seen = []
    first = ensure_demo(SPEC, tmp_path, said.append, lambda *counts: seen.append(counts))
    stamped_s = first.stat().st_mtime_ns
    again = ensure_demo(SPEC, tmp_path, said.append)
    assert first == again == tmp_path / "demo-spine-1x100" / "manifest.csv"
    assert again.stat().st_mtime_ns == stamped_s
    assert (
        said[0] == f"No manifest given: making 1 synthetic radiographs of 100 px in {first.parent}"
    )
    assert said[1].startswith("No manifest given: using the synthetic radiographs of 100 px in")
    assert seen == [(1, 1)]
    assert entries(tmp_path) == ["demo-spine-1x100"]
    assert read_manifest(again, "spine").records[0].path.is_file()


def test_data_that_lost_a_file_is_made_again(made, said):
    manifest = made / SPEC.folder_name / "manifest.csv"
    image = read_manifest(manifest, "spine").records[0].path
    image.unlink()
    ensure_demo(SPEC, made, said.append)
    assert "making" in said[0]
    assert image.is_file()


@pytest.mark.parametrize("name", ["demo.json", "manifest.csv"])
@pytest.mark.parametrize("content", [None, "", "{}"])
def test_data_whose_tables_are_damaged_is_made_again(made, said, name, content):
    path = made / SPEC.folder_name / name
    path.unlink() if content is None else path.write_text(content)
    ensure_demo(SPEC, made, said.append)
    assert "making" in said[0]


def test_data_of_another_version_of_the_generator_is_made_again(made, said):
    stamp = made / SPEC.folder_name / "demo.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "generator_sha256": "old"}))
    ensure_demo(SPEC, made, said.append)
    assert "making" in said[0]


def test_an_interrupted_build_leaves_nothing(tmp_path, said):
    def interrupt(done, n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_demo(SPEC, tmp_path, said.append, interrupt)
    assert entries(tmp_path) == []


def test_what_a_killed_build_left_is_cleared_away(tmp_path, said):
    left = tmp_path / f".{SPEC.folder_name}.partial"
    left.mkdir()
    (left / "half.dcm").write_bytes(b"half")
    manifest = ensure_demo(SPEC, tmp_path, said.append)
    assert entries(tmp_path) == [SPEC.folder_name]
    assert not (manifest.parent / "half.dcm").exists()


def test_of_jobs_that_start_at_once_one_makes_the_data(tmp_path):
    code = (
        "import sys; from pathlib import Path; from umtrain.data.demo import *;"
        f"ensure_demo({SPEC!r}, Path(sys.argv[1]), print)"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    texts = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert sum("making 1 synthetic" in text for text in texts) == 1
    assert sum("using the synthetic" in text for text in texts) == 2
    assert entries(tmp_path) == [SPEC.folder_name]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, said):
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as caught:
        ensure_demo(SPEC, tmp_path / "file" / "cache", said.append)
    assert "the demo data cannot be made (Not a directory)" in str(caught.value)
    assert "point UMTRAIN_CACHE at another folder, or give dataset.manifest=PATH" in str(
        caught.value
    )


def test_the_cache_folder_is_where_the_user_or_the_desktop_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("UMTRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/umtrain")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/cache")
    assert cache_folder() == Path("/fast/cache/umtrain")
    monkeypatch.setenv("UMTRAIN_CACHE", "/data/mine")
    assert cache_folder() == Path("/data/mine")


def test_the_default_data_is_made_in_the_cache_folder(monkeypatch, tmp_path, said):
    monkeypatch.setenv("UMTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "N_SLIDES", 1)
    monkeypatch.setattr(demo, "SLIDE_SIZE_PX", 256)
    manifest = demo_manifest("wsi", 256, said.append)
    assert manifest == tmp_path / "demo-wsi-1x256" / "manifest.csv"
    assert len(read_manifest(manifest, "wsi").records) == 1


@given(st.integers(1, 50_000))
def test_demo_slides_are_at_least_as_large_as_the_input(res):
    spec = demo_spec("wsi", res)
    assert spec.size_px >= res
    assert spec.size_px == demo.SLIDE_SIZE_PX or spec.size_px % 1024 == 0
    assert spec.size_px == demo.SLIDE_SIZE_PX or (spec.n == 12 and spec.size_px < res + 1024)


@pytest.mark.parametrize(("least", "most", "rows"), [(128, 2048, 2048), (2112, 8192, 4000)])
def test_demo_radiographs_are_one_set_for_all_common_inputs_and_real_films_above(least, most, rows):
    specs = {demo_spec("spine", res) for res in (least, most)}
    assert {spec.size_px for spec in specs} == {rows}
    assert len(specs) == 1


def test_a_tenth_of_the_demo_radiographs_is_enough_to_tell_resolutions_apart():
    spec = demo_spec("spine", 1024)
    splits = Counter(film.split for film in plan_radiographs(spec.n, spec.seed))
    assert min(splits["val"], splits["test"]) >= 30


def test_a_job_that_has_to_wait_says_so(tmp_path):
    said = queue.SimpleQueue()
    with (tmp_path / f".{SPEC.folder_name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = threading.Thread(target=ensure_demo, args=(SPEC, tmp_path, said.put))
        job.start()
        assert said.get(timeout=60).startswith("Another process is making this data; waiting")
    job.join(60)
    assert "making 1 synthetic" in said.get(timeout=60)
