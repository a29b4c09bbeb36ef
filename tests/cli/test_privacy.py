"""What a run lets out: no patient's identifiers, no file outside, no markup of others, no rights
that the user's umask withholds.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys

import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from umtrain.data.synthetic.radiographs import make_radiographs

SCRIPT_ID = "<script>alert(1)</script>"

# Every command in one process, which notes each path that it opens for writing, makes or renames.
DRIVER = """
import json, os, sys

written = set()
PATHS = {"os.mkdir": 0, "os.rmdir": 0, "os.remove": 0}
PATHS |= {"os.rename": 1, "os.link": 1, "os.symlink": 1}

def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, (str, bytes)):
            written.add(os.path.abspath(os.fsdecode(path)))
    elif event in PATHS:
        written.add(os.path.abspath(os.fsdecode(arguments[PATHS[event]])))

if __name__ == "__main__":
    os.umask(0o077)
    sys.addaudithook(hook)
    from umtrain.cli import main
    codes = [main(command.split("|")) for command in sys.argv[1:]]
    sys.stdout.flush()
    print(json.dumps({"codes": codes, "written": sorted(written)}))
"""


def plant(path):
    """Put identifiers where a header has them, and one where a number belongs."""
    film = pydicom.dcmread(path)
    film.PatientName, film.PatientID = "PLANTED^NAME", "PLANTED-ID"
    film.AccessionNumber, film.StudyID = "PLANTED-ACC", "PLANTED-STUDY"
    film.PatientBirthDate = film.StudyDate = film.AcquisitionDate = "19010203"
    film.ReferringPhysicianName = film.OperatorsName = "PLANTED^DOCTOR"
    film.InstitutionName, film.PatientComments = "PLANTED HOSPITAL", "PLANTED COMMENT"
    film.StudyInstanceUID = "1.2.3.19010203"
    film.StationName, film.PatientAddress = "PLANTED STATION", "PLANTED STREET"
    film.save_as(path)


def spoil(path):
    """Make a file whose reading fails on a text that names the patient."""
    film = pydicom.dcmread(path)
    tag = Tag("WindowCenter")
    film[tag] = RawDataElement(tag, "DS", 14, b"PLANTED^NAME  ", 0, False, True)
    film.save_as(path)


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All commands on films with planted identifiers: folder, process, what was written."""
    folder = tmp_path_factory.mktemp("privacy")
    for name in ("films", "work", "home", "tmp"):
        (folder / name).mkdir()
    manifest = make_radiographs(folder / "films", 8, 256, 0, None, 1)
    with manifest.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        plant(manifest.parent / row["path"])
        row["sha256"] = ""
    tests = [row for row in rows if row["split"] == "test"]
    tests[0]["image_id"] = SCRIPT_ID
    train = [row for row in rows if row["split"] == "train"]
    spoil(manifest.parent / train[0]["path"])
    with manifest.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before = digests(folder / "films")
    (folder / "driver.py").write_text(DRIVER)
    fit = f"fit|dataset=spine|res=128|epochs=1|dataset.manifest={manifest}|run_dir=run|cases=2"
    commands = [f"data|check|{manifest}", fit, "eval|run=run", "report|run", "fit|res=1|seed=x"]
    # What a process with torch in it has set, this one's, is not for the commands.
    others = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(folder / "home/.cache")}
    done = subprocess.run(
        [sys.executable, folder / "driver.py", *commands],
        cwd=folder / "work",
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert digests(folder / "films") == before
    return folder, done, json.loads(done.stdout.splitlines()[-1])


def test_every_command_ends_as_it_should(finished):
    _, done, found = finished
    assert found["codes"] == [2, 0, 0, 0, 2], done.stderr  # the check finds the spoilt film
    assert "Traceback" not in done.stderr


def test_no_identifier_of_a_header_leaves_it(finished):
    folder, done, _ = finished
    for text in (done.stdout, done.stderr):
        assert "PLANTED" not in text
        assert "19010203" not in text
    files = [path for path in (folder / "work").rglob("*") if path.is_file()]
    assert {"metrics.json", "report.html", "log.txt", "predictions.csv"} <= {p.name for p in files}
    for path in files:
        content = path.read_bytes()
        assert b"PLANTED" not in content, path
        assert b"19010203" not in content, path


def test_the_film_whose_error_would_quote_its_patient_was_left_out(finished):
    folder, _, _ = finished
    record = json.loads((folder / "work/run/metrics.json").read_text())
    (entry,) = record["data"]["skipped"]
    assert entry["split"] == "train"


def test_nothing_is_written_outside_the_run_the_cache_and_the_temporary_folder(finished):
    folder, _, found = finished
    home = folder / "home"
    # matplotlib's list of fonts; of umtrain's own cache, beside it, what a compiler made alone.
    fonts = [home / ".cache", home / ".config"]
    native = home / ".cache" / "umtrain" / "native"
    caches = [*(f"{path}/matplotlib" for path in fonts), native]
    allowed = [*fonts, native.parent, *caches, f"{folder}/work/run"]
    elsewhere = [
        path
        for path in found["written"]
        if path not in map(str, allowed)
        and not path.startswith(tuple(f"{place}/" for place in (*allowed[3:], folder / "tmp")))
        and not path.startswith(("/dev/", "/proc/"))
    ]
    assert elsewhere == []
    assert [path.name for path in (folder / "work").iterdir()] == ["run"]
    assert {path.name for base in fonts for path in base.glob("*")} <= {"matplotlib", "umtrain"}
    assert {path.suffix for path in native.parent.rglob("*") if path.is_file()} <= {".so"}
    # torch leaves an empty folder.
    assert [path for path in (folder / "tmp").rglob("*") if path.is_file()] == []


def test_markup_in_an_id_is_text_on_the_page(finished):
    folder, _, _ = finished
    page = (folder / "work/run/report.html").read_text()
    assert SCRIPT_ID not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_umask_holds_for_everything_in_the_run(finished):
    folder, _, _ = finished
    for path in (folder / "work").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
