"""Tables and the page of a run, from records of today and from older ones."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from umtrain.errors import RunError
from umtrain.report.canvas import Absent
from umtrain.report.html import write_report, write_run_page
from umtrain.report.plots import run_plots
from umtrain.report.plots_sweep import sweep_plot
from umtrain.report.reasons import SECTION_KEYS, all_reasons
from umtrain.report.record import read_record
from umtrain.report.tables import mean_std, run_rows, strategy_table, sweep_table
from umtrain.sweep import rebuild_sweep

LIMIT_BYTES = 6_000_000


def printed(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def record(runs):
    def make(**changes):
        return runs.record(axes={"res": "512", "memory": "vanilla"}) | changes

    return make


@pytest.fixture
def predictions(runs):
    return runs.slide_predictions(8, 0)


def test_a_run_shows_its_headline_with_the_interval(record):
    rows = dict(run_rows(record()))
    assert rows["test AUC (95% CI)"] == "0.750 (0.200–0.970)"
    assert rows["device memory, peak"] == "1.00 GiB"
    assert rows["train images/s"] == "2.50 ± 0.25"


def test_throughput_says_what_it_counts(record):
    speed = record()["throughput"] | {"unit": "patches"}
    assert dict(run_rows(record(throughput=speed)))["train patches/s"] == "2.50 ± 0.25"


def test_a_job_out_of_memory_is_a_row_that_says_so(record):
    oom = record(status="oom", throughput=None, memory_use=None, test=None)
    assert "OOM" in printed(sweep_table([record(), oom], ["res"]))


def test_brackets_in_what_a_user_wrote_are_shown_not_read_as_markup(record):
    odd = record(axes={"memory.cpu_layers": "[layer1]", "x": "[/x]"})
    text = printed(sweep_table([odd], ["memory.cpu_layers", "x"]))
    assert "[layer1]" in text
    assert "[/x]" in text


def test_an_axis_of_words_and_numbers_is_drawn_in_order(record, tmp_path):
    records = [record(axes={"optim.clip_norm": value}) for value in ("null", "1.0")]
    assert sweep_plot(tmp_path / "s.png", records, "optim.clip_norm").exists()


def test_datasets_side_by_side_have_a_panel_each(record, tmp_path):
    spine = record(dataset="spine", test={"n": 3, "mae_mm": 2.0, "mae_ci_mm": [1.0, 3.0]})
    widths = []
    for name, records in (("a.png", [record()]), ("b.png", [record(), spine])):
        with Image.open(sweep_plot(tmp_path / name, records, "res")) as image:
            widths.append(image.width)
    assert widths[1] > widths[0]
    text = printed(sweep_table([record(), spine], ["res"]))
    assert "AUC (95% CI) or SVA MAE, mm (95% CI)" in text
    assert "2.00 (1.00–3.00)" in text


def test_the_comparison_has_resolutions_down_and_strategies_across(record):
    records = [
        record(memory="vanilla", res=512),
        record(memory="um", res=512),
        record(memory="vanilla", res=256, status="oom"),
    ]
    lines = [line for line in printed(strategy_table(records)).splitlines() if "│" in line]
    assert "256" in lines[0]
    assert "OOM" in lines[0]
    assert lines[1].count("2.50 ± 0.25") == 2


def test_an_unknown_figure_is_a_dash():
    assert mean_std({"mean": None, "std": None, "n": 0}) == "–"
    assert mean_std({"mean": 1.0, "std": None, "n": 1}) == "1.00"


def test_plots_are_pictures_of_some_size_each_with_words(runs, tmp_path):
    run_dir = runs.slides(tmp_path / "slides")
    panels = run_plots(run_dir, read_record(run_dir), runs.slide_predictions(60, 0))
    names = {panel.path.stem for panel in panels}
    curves = {"roc_test", "pr_test", "probabilities_test", "calibration_test", "confusion_test"}
    assert names == curves | {"training"}
    for panel in panels:
        assert panel.alt
        assert panel.caption
        with Image.open(panel.path) as image:
            assert image.width > 600


@pytest.mark.parametrize("kind", ["slides", "films"])
def test_a_figure_that_is_null_has_its_reason_on_the_page(runs, tmp_path, kind):
    run_dir = getattr(runs, kind)(tmp_path / kind)
    whole = read_record(run_dir)
    keys = SECTION_KEYS[whole["dataset"]]
    # With an AUC and without: some panels are there only for its sake.
    for kept in ((), ("auc", "mae_mm")):
        changed = dict(whole["test"])
        for key in set(keys) - {"cases", *kept}:
            changed |= {key: None, f"{key}_reason": f"a <reason> of {key}'s own"}
        rows = (runs.slide_predictions if kind == "slides" else runs.film_predictions)(34, 0)
        page = write_run_page(run_dir, whole | {"test": changed}, rows).read_text()
        for key in set(keys) - {"cases", *kept}:
            assert f"a &lt;reason&gt; of {key}&#39;s own" in page, key


def test_an_older_record_still_has_curves_and_says_what_it_lacks(record, predictions, tmp_path):
    old = record()
    panels = run_plots(tmp_path, old, predictions)
    absent = {panel.title for panel in panels if isinstance(panel, Absent)}
    assert absent == {"Calibration, test", "Confusion at the threshold, test", "Training"}
    assert (tmp_path / "roc_test.png").exists()
    reasons = all_reasons(old)
    assert "`umtrain eval split=test` on the run adds it" in reasons["test.curves"]
    assert "test.auc" not in reasons
    page = write_report(tmp_path, old, panels).read_text()
    assert "test.calibration" in page


def test_a_reason_deep_in_a_section_is_told(record):
    test = record()["test"] | {"icc": {"value": 1.0, "ci": None, "ci_reason": "no spread"}}
    assert all_reasons(record(test=test))["test.icc.ci"] == "no spread"


def test_a_split_of_one_class_has_no_curve_but_a_reason(record, predictions, tmp_path):
    one_class = {"n": 1, "auc": None, "auc_reason": "one class only", "accuracy": 1.0}
    positives = [row for row in predictions if row["label"]]
    panels = run_plots(tmp_path, record(test=one_class), positives)
    assert [panel.reason for panel in panels[:2]] == ["one class only"] * 2
    assert (tmp_path / "probabilities_test.png").exists()


def test_the_page_stands_alone_and_escapes_what_it_is_given(runs, record, predictions, tmp_path):
    hostile = "<script>alert('x')</script>"
    given = record(
        reasons={hostile: hostile}, annotation=hostile, model=hostile, memory=hostile, seed=hostile
    )
    given["data"] |= {"manifest": hostile, "positive": hostile}
    given["data"]["skipped"] = [{"id": hostile, "reason": hostile}]
    given["test"]["cases"] = [{"id": hostile, "picture": hostile, "caption": hostile}]
    rows = [row | {"id": hostile} for row in predictions]
    page = write_run_page(runs.write(tmp_path / "run", given, rows), given, rows).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") == 4
    assert 'class="n">(0.200–0.970)</span>' in page


def test_images_left_out_are_told_with_the_reason(record, tmp_path):
    skipped = [{"id": "slide_7", "reason": "the file is cut short"}]
    page = write_report(tmp_path, record(data=record()["data"] | {"skipped": skipped}), [])
    text = page.read_text()
    assert "slide_7" in text
    assert "the file is cut short" in text


def test_the_page_of_a_failed_run_leads_with_what_happened(record, tmp_path):
    failed = record(status="oom", test=None, reasons={"status": "device memory ran out"})
    page = write_run_page(tmp_path, failed, []).read_text()
    assert "ended as oom: device memory ran out" in page


def test_many_large_cases_keep_the_page_small_the_rest_is_linked(runs, record, tmp_path):
    rows = runs.slide_predictions(12, 0)
    run_dir = runs.write(tmp_path / "run", record(test=runs.slide_section(rows)), rows, n_cases=12)
    for path in sorted((run_dir / "cases").iterdir()):
        noise = Image.effect_noise((900, 900), 80)  # about 700 kB each
        noise.save(path)
    page = write_run_page(run_dir, read_record(run_dir), rows)
    text = page.read_text()
    assert page.stat().st_size < LIMIT_BYTES
    inside = text.count("Picture of slide_")
    assert 3 <= inside < 8
    assert text.count('<p><a href="cases/test-slide_') == 12 - inside


def test_at_most_eight_cases_are_inside(runs, tmp_path):
    run_dir = runs.slides(tmp_path / "run", n_cases=11)
    text = write_run_page(run_dir, read_record(run_dir), []).read_text()
    assert text.count("Picture of slide_") == 8
    assert text.count('<p><a href="cases/test-slide_') == 3


def test_a_case_outside_the_run_is_not_shown(runs, record, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    rows = runs.slide_predictions(8, 0)
    given = record(test=runs.slide_section(rows))
    given["test"]["cases"] = [{"id": "a", "picture": "../secret.png", "caption": "x"}]
    run_dir = runs.write(tmp_path / "run", given, rows)
    text = write_report(run_dir, given, []).read_text()
    assert "data:image" not in text
    assert "../secret.png is not there any more" in text


def test_a_timeline_is_shown_where_there_is_one(runs, record, tmp_path):
    Image.new("RGB", (1680, 480)).save(tmp_path / "timeline.png")
    assert "Timeline of one step" in write_report(tmp_path, record(), []).read_text()


def test_a_sweep_is_made_again_from_its_summary(runs, tmp_path):
    folder = runs.sweep(tmp_path / "sweep")
    text = rebuild_sweep(folder).read_text()
    assert "6 jobs: 5 finished, 1 ran out of memory." in text
    assert "2 GiB are too little; memory=stream fits" in text
    assert text.count("data:image/png;base64,") == 3
    assert (folder / "sweep_auc.png").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"axes": {}}]', '[{"axes": {"res": "1"}}]'])
def test_a_damaged_summary_is_named(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(RunError, match=r"summary\.json: not"):
        rebuild_sweep(tmp_path)


def test_a_job_that_died_before_its_record_is_on_the_sweeps_page(runs, tmp_path):
    folder = runs.sweep(tmp_path / "sweep")
    records = json.loads((folder / "summary.json").read_text())
    kept = ("status", "command", "dataset", "model", "res", "memory", "precision", "device", "seed")
    lost = {key: records[1][key] for key in kept} | {"axes": records[1]["axes"]}
    lost |= {"status": "failed", "reasons": {"status": "ended by signal 9 (Killed)"}}
    (folder / "summary.json").write_text(json.dumps([records[0], lost]))
    text = rebuild_sweep(folder).read_text()
    assert "2 jobs: 1 finished, 1 failed." in text
    assert "ended by signal 9 (Killed)" in text
