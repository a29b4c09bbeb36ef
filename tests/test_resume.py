"""What a run that goes on must share with the one that was interrupted."""

import dataclasses
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from small_trainer import SignalAfter, SmallTask, make_task, make_trainer

from umtrain.checkpoint import load_checkpoint, save_checkpoint, step_path, step_paths
from umtrain.clock import RunClock
from umtrain.config import config_to_dict, load_config
from umtrain.device import naming_device_failures
from umtrain.errors import ConfigError, DeviceError, Interrupted, RunError
from umtrain.logger import RunLogger
from umtrain.resume import Start, differences, plan_start
from umtrain.run_dir import choose_run_dir, continued_config, write_config
from umtrain.signals import StopRequest
from umtrain.tasks.slides import SlideTask


class NoLoss(SlideTask):
    """A task whose loss is no number whenever one of `hopeless` is in the batch."""

    hopeless = ()

    def loss(self, outputs, batch):
        factor = float("nan") if set(batch["id"]) & set(self.hopeless) else 1.0
        return super().loss(outputs, batch) * factor


def newest(folder):
    return load_checkpoint(step_paths(folder / "checkpoints")[0])


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert one.equal(other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def results(folder):
    """Return what training gave, without what was measured."""
    state = newest(folder)
    for key in ("started_at_s", "elapsed_s", "memory_use"):
        del state[key]
    state["progress"]["steps"] = state["progress"]["steps"][:, :5]
    del state["progress"]["resumed_after"]
    return state, load_checkpoint(folder / "checkpoints" / "best.pt")


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=adamw", "optim.schedule=cosine", "batch_size=1"),
        ("optim=sgd", "optim.schedule=plateau", "batch_size=1", "optim.accumulate=2"),
    ],
    ids=["adamw", "sgd"],
)
def test_a_run_stopped_in_mid_epoch_ends_as_one_that_was_not(overrides, slides, tmp_path):
    task = make_task(slides, *overrides)
    make_trainer(task, tmp_path / "whole").fit()
    stopped_after = 3 if task.config.optim.accumulate == 1 else 1
    with StopRequest(60) as stop:
        trainer = make_trainer(task, tmp_path / "run", SignalAfter(stopped_after), stop)
        with pytest.raises(Interrupted, match="SIGTERM"):
            trainer.fit()
    assert newest(tmp_path / "run")["step"] == stopped_after
    torch.manual_seed(99)  # what a new process happens to begin with
    again = make_trainer(task, tmp_path / "run")
    again.restore(step_path(tmp_path / "run" / "checkpoints", stopped_after))
    again.fit()
    assert again.progress.resumed_after == [stopped_after]
    assert_same(results(tmp_path / "run"), results(tmp_path / "whole"))


def trained(task, folder, stop_after=None):
    """Go on with the run in `folder`, or begin it, until a signal in step `stop_after`."""
    logger = RunLogger() if stop_after is None else SignalAfter(stop_after)
    with StopRequest(60) as stop:
        trainer = make_trainer(task, folder, logger, stop)
        for newest_path in step_paths(folder / "checkpoints")[:1]:
            trainer.restore(newest_path)
        with nullcontext() if stop_after is None else pytest.raises(Interrupted):
            trainer.fit()
    return trainer


def test_no_image_of_an_epoch_is_lost_however_often_other_ranks_go_on(slides, tmp_path):
    one_rank = make_task(slides, "epochs=1", "batch_size=1", kind=SmallTask)
    trained(one_rank, tmp_path, stop_after=1)
    as_two_ranks = make_task(slides, "epochs=1", "batch_size=2", kind=SmallTask)
    trained(as_two_ranks, tmp_path, stop_after=2)
    again = trained(as_two_ranks, tmp_path)
    # The batch of which one image was trained begins anew; then the rest of the four.
    assert [step.images for step in again.progress.steps] == [1, 2, 2]


def test_long_epochs_are_saved_by_the_clock(slides, tmp_path):
    make_trainer(make_task(slides, "checkpoint_minutes=0", "epochs=1"), tmp_path).fit()
    assert [path.name for path in step_paths(tmp_path / "checkpoints")] == [
        "step-00000002.pt",
        "step-00000001.pt",
    ]


def test_best_weights_of_steps_that_are_lost_are_put_right(slides, tmp_path):
    task = make_task(slides, "epochs=1")
    make_trainer(task, tmp_path).fit()
    best = tmp_path / "checkpoints" / "best.pt"
    expected = load_checkpoint(best)
    save_checkpoint(best, {"model": {}, "epoch": 9, "step": 99})
    make_trainer(task, tmp_path).restore(step_path(tmp_path / "checkpoints", 2))
    assert_same(load_checkpoint(best), expected)


@pytest.fixture
def going_back(slides, tmp_path):
    """A run of four steps, and what goes on with it after the second one, the best one then."""
    task = make_task(slides, kind=SmallTask)
    make_trainer(task, tmp_path).fit()
    trainer = make_trainer(task, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    kept = step_path(tmp_path / "checkpoints", 2).replace(tmp_path / "elsewhere" / "kept.pt")
    return trainer, kept, tmp_path / "checkpoints"


def test_steps_that_are_given_up_stay_until_others_are_saved(going_back):
    trainer, kept, folder = going_back
    newer = step_path(folder, 4)
    save_checkpoint(step_path(folder, 5), load_checkpoint(newer))
    trainer.restore(kept)
    assert step_paths(folder) == [step_path(folder, 5), newer]
    trainer.fit()
    assert step_paths(folder) == [newer]
    assert load_checkpoint(newer)["progress"]["resumed_after"] == [2]


def test_the_best_weights_are_had_from_the_checkpoint_that_is_gone_on_from(going_back):
    trainer, kept, folder = going_back
    (folder / "best.pt").write_bytes(b"")
    trainer.restore(kept)
    assert load_checkpoint(folder / "best.pt")["step"] == 2
    assert not (kept.parent / "best.pt").exists()


def test_whole_best_weights_need_no_other_file(going_back):
    trainer, kept, folder = going_back
    state = load_checkpoint(kept)
    state["progress"]["best_steps"] = [1]
    save_checkpoint(kept, state)
    save_checkpoint(folder / "best.pt", {"model": {}, "epoch": 1, "step": 1})
    before = (folder / "best.pt").stat().st_ino
    trainer.restore(kept)
    assert (folder / "best.pt").stat().st_ino == before
    save_checkpoint(folder / "best.pt", {"model": {}, "epoch": 1, "step": 3})
    text = (
        r"of step 1, are in no file:\n  .*step-00000001\.pt: no such checkpoint.*\n"
        r"  .*best\.pt: the weights of step 3\nRestore one of the two"
    )
    with pytest.raises(RunError, match=text):
        trainer.restore(kept)


def test_a_signal_as_the_best_weights_are_put_right_waits_for_that(going_back, monkeypatch):
    trainer, kept, folder = going_back

    def save(path, state):
        os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(path, state)

    monkeypatch.setattr("umtrain.training.save_checkpoint", save)
    (folder / "best.pt").unlink()
    with trainer.stop, pytest.raises(Interrupted, match="SIGTERM"):
        trainer.restore(kept)
    assert load_checkpoint(folder / "best.pt")["step"] == 2


@pytest.mark.fault("a loss that is no number, on_nan=skip", "left out, counted, weights as before")
def test_an_update_without_a_loss_is_left_out_and_counted(slides, tmp_path):
    task = make_task(slides, "on_nan=skip", "epochs=1", "batch_size=1", kind=NoLoss)
    task.hopeless = (task.manifest.split("train")[0].id,)
    states = []

    class Watch(RunLogger):
        def step(self, number, scalars):
            states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})

    trainer = make_trainer(task, tmp_path, Watch())
    states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    trainer.fit()
    (entry,) = trainer.progress.left_out
    assert (entry["images"], entry["loss"]) == (list(task.hopeless), "nan")
    assert_same(states[entry["step"]], states[entry["step"] - 1])
    assert all(value.isfinite().all() for value in states[-1].values())
    assert trainer.progress.train_figures()["steps_left_out"] == [entry]


@pytest.mark.fault("ten such losses in a row, on_nan=skip", "stopped, the last step named")
def test_a_run_without_any_loss_is_not_left_to_run_on(slides, tmp_path):
    task = make_task(slides, "on_nan=skip", "epochs=9", "batch_size=1", kind=NoLoss)
    task.hopeless = tuple(slide.id for slide in task.manifest.split("train"))
    with pytest.raises(RunError, match="10 steps in a row had a loss or gradients"):
        make_trainer(task, tmp_path).fit()


def test_a_loss_that_is_no_number_stops_with_step_and_image(slides, tmp_path):
    task = make_task(slides, "epochs=1", "batch_size=1", kind=NoLoss)
    task.hopeless = (task.manifest.split("train")[0].id,)
    with pytest.raises(RunError, match=rf"became nan at step \d on {task.hopeless[0]}; .*on_nan"):
        make_trainer(task, tmp_path).fit()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_gpu_that_failed_is_no_defect_of_ours(error):
    with (
        pytest.raises(DeviceError, match=r"the GPU failed \((CUDA|cuDNN) error: .*\); see `n"),
        naming_device_failures(),
    ):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), naming_device_failures():
        raise RuntimeError("shapes differ")


class GoneAtStep2(SlideTask):
    """A task whose second batch meets a GPU that has gone."""

    n_batches = 0

    def inputs(self, batch, device, dtype):
        self.n_batches += 1
        if self.n_batches == 2:
            raise torch.AcceleratorError("CUDA error: device is lost")
        return super().inputs(batch, device, dtype)


def test_a_gpu_that_goes_in_mid_step_leaves_a_run_to_go_on_with(slides, tmp_path):
    task = make_task(slides, "checkpoint_minutes=0", "epochs=1", kind=GoneAtStep2)
    with pytest.raises(DeviceError, match="device is lost"), naming_device_failures():
        make_trainer(task, tmp_path).fit()
    again = make_trainer(task, tmp_path)
    again.restore(step_path(tmp_path / "checkpoints", 1))
    again.fit()
    assert len(again.progress.steps) == again.total_steps


def config(*overrides):
    return load_config(list(overrides))


@pytest.mark.parametrize(
    "change",
    [
        *("dataset.workers=3", "memory=lms", "memory.device_budget=2GiB", "cases=0", "trace=true"),
        *("run_dir=elsewhere", "on_nan=skip", "checkpoint_minutes=1", "dataset.root=elsewhere"),
    ],
)
def test_what_cannot_change_the_numbers_may_change(change):
    assert differences(config_to_dict(config()), config_to_dict(config(change))) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("optim.lr=0.5", "optim.lr: 0.001, now 0.5"),
        ("seed=4", "seed: 0, now 4"),
        ("model.pool=max", "model.pool: null, now max"),
        ("epochs=20", "epochs: 10, now 20"),
        ("max_steps=7", "max_steps: null, now 7"),
    ],
)
def test_what_changes_the_numbers_is_named_key_by_key(change, line):
    before = config("optim.lr=0.001", "epochs=10")
    overrides = ["optim.lr=0.001", "epochs=10", change]
    assert differences(config_to_dict(before), config_to_dict(config(*overrides))) == [line]


def test_more_epochs_are_free_where_the_rate_does_not_depend_on_them():
    for free in (
        ["optim.schedule=plateau"],
        ["optim.schedule=constant", "optim.warmup_fraction=0"],
    ):
        before = config_to_dict(config("epochs=3", *free))
        assert differences(before, config_to_dict(config("epochs=5", *free))) == []
        assert differences(before, config_to_dict(config("epochs=2", *free))) == [
            "epochs: 3, now 2"
        ]


@pytest.fixture
def run_dir(tmp_path):
    """A run with a checkpoint, of the default configuration."""
    write_config(tmp_path, config())
    state = {
        "step": 4,
        "strategy": "stream",
        "manifest_sha256": "abc",
        "config": config_to_dict(config()),
    }
    save_checkpoint(step_path(tmp_path / "checkpoints", 4), state)
    return tmp_path


def test_a_run_goes_on_from_its_newest_checkpoint_with_what_auto_had_chosen(run_dir):
    said = []
    start = plan_start(run_dir, config(), "abc", said.append)
    assert start == Start(step_path(run_dir / "checkpoints", 4), "stream", False, 4)
    assert said == ["resume   after step 4"]


def test_another_memory_strategy_is_said(run_dir):
    said = []
    plan_start(run_dir, config("memory=lms"), "abc", said.append)
    assert said[1] == "memory   lms; stream before; the last bits may differ"


def test_other_rows_are_refused(run_dir):
    with pytest.raises(ConfigError, match=r"is not the manifest that .* is trained with"):
        plan_start(run_dir, config(), "def", print)


def test_an_older_checkpoint_by_name_takes_the_run_back(run_dir):
    for name, step in (("kept.pt", 6), ("step-00000008.pt", 8)):
        state = load_checkpoint(step_path(run_dir / "checkpoints", 4))
        save_checkpoint(run_dir / "checkpoints" / name, {**state, "step": step})
    older = run_dir / "checkpoints" / "kept.pt"
    chosen = continued_config([f"resume={older}", "dataset.workers=0", "memory=vanilla"])
    assert (chosen.dataset.workers, chosen.memory.name) == (0, "vanilla")
    assert choose_run_dir(chosen) == run_dir
    start = plan_start(run_dir, chosen, "abc", lambda text: None)
    assert (start.checkpoint, start.step) == (older, 6)
    # Whether that works is still to be seen.
    assert step_path(run_dir / "checkpoints", 8).exists()


def test_a_damaged_record_is_no_record(run_dir):
    (run_dir / "metrics.json").write_text("{")
    said = []
    assert not plan_start(run_dir, config(), "abc", said.append).is_over
    assert said[0] == f"record   {run_dir / 'metrics.json'} is damaged; it is written anew"


def test_weights_alone_are_not_gone_on_from(run_dir):
    best = run_dir / "checkpoints" / "best.pt"
    save_checkpoint(best, {"model": {}, "step": 4})
    with pytest.raises(RunError, match="weights alone; training goes on from one of the step-"):
        plan_start(run_dir, continued_config([f"resume={best}"]), "abc", print)


def test_resume_of_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run there; name a run directory"):
        continued_config([f"resume={tmp_path}"])


def test_a_folder_with_other_things_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty, and no run; name a new folder"):
        choose_run_dir(config(f"run_dir={tmp_path}"))


def test_never_is_never(run_dir):
    with pytest.raises(ConfigError, match=r"not empty; name a new folder, or go on .*resume=auto"):
        choose_run_dir(config(f"run_dir={run_dir}", "resume=never"))


def test_the_clock_of_a_run_goes_on_whatever_the_machines_clock_does(monkeypatch):
    clock = RunClock()
    monkeypatch.setattr("time.time", lambda: -1e9)
    clock.go_on(started_at_s=100.0, elapsed_s=3600.0)
    assert clock.started_at_s == 100.0
    assert 3600 <= clock.elapsed_s < 3700


def test_frozen_dataclass_config_round_trips_through_a_checkpoint(tmp_path):
    chosen = dataclasses.replace(config(), seed=2**40)
    save_checkpoint(tmp_path / "a.pt", {"config": config_to_dict(chosen)})
    assert load_checkpoint(tmp_path / "a.pt")["config"] == config_to_dict(chosen)
