"""Tables, plots and the page of a run, from records."""

import io

import pytest
from PIL import Image
from rich.console import Console

from umtrain.report.html import write_report
from umtrain.report.plots import run_plots, sweep_plot
from umtrain.report.tables import mean_std, run_rows, strategy_table, sweep_table


def record(**changes):
    return {
        "status": "ok",
        "dataset": "wsi",
        "model": "resnet50",
        "res": 512,
        "memory": "vanilla",
        "precision": "bf16",
        "device": "cpu",
        "seed": 0,
        "throughput": {
            "images_per_s": {"mean": 2.5, "std": 0.25, "n": 9},
            "step_s": {"mean": 0.4, "std": 0.04, "n": 9},
        },
        "memory_use": {"device_peak_bytes": 2**30, "rss_peak_bytes": 2**31},
        "train": {"validations": [{"epoch": 1, "loss": 0.4, "auc": 0.8}]},
        "val": None,
        "test": {"n": 4, "auc": 0.75, "auc_ci": [0.2, 0.97], "accuracy": 0.5},
        "environment": {
            "device_name": "a processor",
            "platform": "Linux",
            "git": None,
            "versions": {"torch": "2"},
        },
        "data": {"manifest": "slides.csv", "n_test": 4},
        "reasons": {},
        "axes": {"res": "512", "memory": "vanilla"},
        "elapsed_s": 12.0,
        **changes,
    }


def printed(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


PREDICTIONS = [
    {"id": "a", "split": "test", "label": "0", "prob": "0.1"},
    {"id": "b", "split": "test", "label": "1", "prob": "0.9"},
]


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "steps.csv").write_text("step,epoch,loss\n1,1,0.9\n2,1,0.5\n")
    return tmp_path


def test_a_run_shows_its_headline_with_the_interval():
    rows = dict(run_rows(record()))
    assert rows["test AUC (95% CI)"] == "0.750 (0.200-0.970)"
    assert rows["device memory, peak"] == "1.00 GiB"
    assert rows["train images/s"] == "2.50 ± 0.25"


def test_a_job_out_of_memory_is_a_row_that_says_so():
    oom = record(status="oom", throughput=None, memory_use=None, test=None)
    assert "OOM" in printed(sweep_table([record(), oom], ["res"]))


def test_brackets_in_what_a_user_wrote_are_shown_not_read_as_markup():
    odd = record(axes={"memory.cpu_layers": "[layer1]", "x": "[/x]"})
    text = printed(sweep_table([odd], ["memory.cpu_layers", "x"]))
    assert "[layer1]" in text
    assert "[/x]" in text


def test_an_axis_of_words_and_numbers_is_drawn_in_order(run_dir):
    records = [record(axes={"optim.clip_norm": value}) for value in ("null", "1.0")]
    assert sweep_plot(run_dir / "s.png", records, "optim.clip_norm").path.exists()


def test_datasets_side_by_side_have_a_panel_each(run_dir):
    spine = record(dataset="spine", test={"n": 3, "mae_mm": 2.0, "mae_ci_mm": [1.0, 3.0]})
    widths = []
    for name, records in (("a.png", [record()]), ("b.png", [record(), spine])):
        with Image.open(sweep_plot(run_dir / name, records, "res").path) as image:
            widths.append(image.width)
    assert widths[1] > widths[0]
    assert "AUC (95% CI) or SVA MAE, mm" in printed(sweep_table([record(), spine], ["res"]))


def test_the_comparison_has_resolutions_down_and_strategies_across():
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
    assert mean_std({"mean": None, "std": None, "n": 0}) == "-"
    assert mean_std({"mean": 1.0, "std": None, "n": 1}) == "1.00"


def test_plots_are_pictures_of_some_size(run_dir):
    for picture in run_plots(run_dir, record(), PREDICTIONS):
        with Image.open(picture.path) as image:
            assert image.width > 400
    drawn = sweep_plot(run_dir / "s.png", [record(), record(res=1024, status="oom")], "res")
    assert drawn.path.exists()


def test_a_split_of_one_class_has_a_plot_that_says_so(run_dir):
    one_class = record(test={"n": 1, "auc": None, "auc_reason": "one class", "accuracy": 1.0})
    pictures = run_plots(run_dir, one_class, PREDICTIONS[:1])
    assert pictures[-1].path.exists()


def test_the_page_stands_alone_and_escapes_what_it_is_given(run_dir):
    hostile = "<script>alert('x')</script>"
    given = record(data={"manifest": hostile}, reasons={"test.auc": hostile})
    page = write_report(run_dir, given, run_plots(run_dir, given, PREDICTIONS)).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "AUC (95% CI) 0.750 (0.200-0.970)" in page


def test_the_page_of_a_failed_run_leads_with_what_happened(run_dir):
    failed = record(status="oom", test=None, reasons={"status": "device memory ran out"})
    page = write_report(run_dir, failed, []).read_text()
    assert "ended as oom: device memory ran out" in page
