import json
import os

import pytest

from umtrain.files import write_atomic, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "kept.txt"
    write_text(path, "old")

    def fails(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fails)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["kept.txt"]


def test_files_get_the_permissions_of_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "shared.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "shared.txt").stat().st_mode & 0o777 == 0o640


def test_json_keeps_every_letter_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Ärztin <b>"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "Ärztin <b>"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()
