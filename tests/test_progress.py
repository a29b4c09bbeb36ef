import csv
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.progress import Progress, Step, StepLog

numbers = st.floats(allow_nan=False)
counts = st.integers(0, 2**40)
steps = st.lists(st.builds(Step, counts, counts, numbers, numbers, counts, numbers, numbers))


@given(steps)
def test_progress_comes_back_from_a_checkpoint_to_the_bit(made):
    progress = Progress(made, [{"epoch": 1, "loss": 0.5}], 1, (0.25, -1.0), 1, [4], [2])
    again = Progress.from_state(progress.state())
    assert again == progress
    assert [type(step.images) for step in again.steps] == [int] * len(made)


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def step(number, loss=1.0):
    return Step(number, 1, loss, 0.1, 2, 0.5, 0.0)


def test_lines_after_the_checkpoint_and_torn_ones_go(tmp_path):
    path = tmp_path / "steps.csv"
    with StepLog(path, []) as log:
        for number in (1, 2, 3):
            log.write(step(number))
    path.write_text(path.read_text()[:-5])
    with StepLog(path, [step(1), step(2)]) as log:
        log.write(step(3, loss=1 / 3))
    rows = read(path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["loss"]) == 1 / 3


def test_throughput_leaves_out_the_warm_up_of_each_session():
    progress = Progress([step(number) for number in range(1, 11)], resumed_after=[5])
    figures = progress.throughput()
    assert figures["step_s"]["n"] == 4  # steps 4, 5, 9 and 10
    assert figures["warmup_steps"] == 6


def test_a_step_that_was_left_out_has_no_part_in_mean_losses():
    progress = Progress([step(1, 2.0), step(2, math.nan), step(3, 4.0), step(4, math.inf)])
    assert progress.epoch_loss(1) == pytest.approx(3.0)
    assert progress.train_figures()["loss_last"] == 4.0
    assert math.isnan(progress.epoch_loss(2))
