import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.errors import RunError
from umtrain.report.record import figure, read_record, summarise, write_record


def test_what_is_not_a_number_becomes_null(tmp_path):
    write_record(tmp_path, {"status": "ok", "loss": float("nan"), "rows": [1.0, float("inf")]})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text) == {"status": "ok", "loss": None, "rows": [1.0, None]}


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "great"}', '{"status": "ok"}', ""])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(RunError, match=r"metrics\.json: .*; restore it .* umtrain fit resume="):
        read_record(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"no such file; is .* a run of umtrain fit"):
        read_record(tmp_path)


def test_a_figure_that_is_not_there_is_none():
    record = {"test": {"auc": 0.9}, "train": None}
    assert figure(record, "test.auc") == 0.9
    assert figure(record, "train.steps") is None
    assert figure(record, "nowhere.at.all") is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=2))
def test_a_summary_lies_within_its_values(values):
    summary = summarise(values)
    assert min(values) - 1e-6 <= summary["mean"] <= max(values) + 1e-6
    assert summary["std"] >= 0
    assert summary["n"] == len(values)


def test_one_value_has_no_deviation():
    assert summarise([3.0]) == {"mean": 3.0, "std": None, "n": 1}
