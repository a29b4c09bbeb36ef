"""What each of several ranks that train together leaves when one is asked to end."""

import os
import signal

import pytest
from small_trainer import SignalAfter, SmallTask, make_task, make_trainer

from umtrain.checkpoint import load_checkpoint, save_checkpoint, step_paths
from umtrain.errors import Interrupted, RankError
from umtrain.parallel.world import World, entered
from umtrain.signals import StopRequest


class Twin(World):
    """The first of two ranks; the other one does and has whatever this one does and has."""

    is_asked_too = False
    is_lost = False

    def start_total(self, values):
        values.mul_(2)
        return lambda: None

    def sums(self, values):
        loss, n_images, *asked = super().sums(values)
        return [loss, n_images, *(n + self.is_asked_too for n in asked)]

    def collect(self, value):
        if self.is_lost:
            raise RankError("another rank has ended")
        return [value] * self.n_ranks

    def tell(self, value):
        return value

    def spread(self, tensors):
        pass


@pytest.fixture
def twin():
    with entered(Twin(n_ranks=2)) as world:
        yield world


def saved_steps(folder):
    return [load_checkpoint(path)["step"] for path in step_paths(folder / "checkpoints")]


def make(slides, folder, logger=None, stop=None):
    task = make_task(slides, "epochs=1", "batch_size=1", kind=SmallTask)
    return make_trainer(task, folder, logger, stop)


def test_a_signal_after_a_step_told_of_none_waits_for_the_next_one(twin, slides, tmp_path):
    with StopRequest(60) as stop:
        trainer = make(slides, tmp_path, SignalAfter(1), stop)
        with pytest.raises(Interrupted, match="SIGTERM"):
            trainer.fit()
    assert saved_steps(tmp_path) == [2]
    assert trainer.progress.epochs == 0


def test_a_signal_between_two_steps_waits_for_the_next_one(twin, slides, tmp_path):
    with StopRequest(60) as stop:
        trainer = make(slides, tmp_path, stop=stop)
        trainer._save_if_due = lambda: os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            trainer.fit()
    assert saved_steps(tmp_path) == [2]


def test_a_signal_to_another_rank_ends_this_one_after_the_same_step(twin, slides, tmp_path):
    twin.is_asked_too = True
    trainer = make(slides, tmp_path)
    with pytest.raises(Interrupted, match="a signal to another rank"):
        trainer.fit()
    assert saved_steps(tmp_path) == [1]


def test_a_rank_that_hears_of_it_twice_saves_all_the_same(twin, slides, tmp_path, monkeypatch):
    def save(path, state):
        os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, state)

    monkeypatch.setattr("umtrain.training.save_checkpoint", save)
    twin.is_asked_too = True
    with StopRequest(60) as stop:
        trainer = make(slides, tmp_path, stop=stop)
        with pytest.raises(Interrupted):
            trainer.fit()
    assert saved_steps(tmp_path) == [1]


def test_a_rank_lost_in_validation_leaves_the_steps_before_it(twin, slides, tmp_path):
    trainer = make(slides, tmp_path)
    twin.is_lost = True
    with pytest.raises(RankError):
        trainer.fit()
    assert saved_steps(tmp_path) == [2]
