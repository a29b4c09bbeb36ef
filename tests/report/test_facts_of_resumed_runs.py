from umtrain.report.facts import time_table


def test_interruptions_and_left_out_updates_are_on_the_page():
    train = {"steps": 9, "epochs": 1, "best_epoch": 1}
    entry = {"step": 7, "images": ["a"], "loss": "nan"}
    told = {**train, "resumed_after_steps": [2, 5], "steps_left_out": [entry]}
    rows = dict(time_table({"train": told}).rows)
    assert rows["Interrupted, and gone on with after step"] == "2, 5"
    assert rows["Steps without an update, as the loss was no number"] == "1"
    quiet = dict(
        time_table({"train": {**told, "resumed_after_steps": [], "steps_left_out": []}}).rows
    )
    assert len(quiet) == len(rows) - 2
