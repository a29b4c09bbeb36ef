"""A run that is followed by TensorBoard: what its event files hold."""

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from umtrain import logger
from umtrain.errors import ConfigError
from umtrain.logger import create_logger


def tags(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_curves_and_pictures_are_in_the_event_files(tmp_path):
    picture = tmp_path / "roc_test.png"
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(picture)
    followed = create_logger("tensorboard", tmp_path)
    followed.step(1, {"loss": 0.5, "lr": 1e-3})
    followed.step(2, {"loss": 0.25, "lr": 1e-3})
    rows = [{"label": 1, "prob": 0.9}, {"label": 0, "prob": 0.2}]
    followed.validation(2, {"loss": 0.3, "auc": None}, rows)
    followed.pictures(2, [picture])
    followed.close()
    events = tags(tmp_path / logger.FOLDER)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert "val/auc" not in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["roc_test"]
    assert "val/precision and recall" in events.Tags()["tensors"]


def test_errors_of_sva_are_a_histogram(tmp_path):
    followed = create_logger("tensorboard", tmp_path)
    followed.validation(1, {"mae_mm": 2.0}, [{"sva_true_mm": 1.0, "sva_pred_mm": 3.0}])
    followed.close()
    assert tags(tmp_path / logger.FOLDER).Tags()["histograms"] == ["val/error of SVA, mm"]


def test_without_a_logger_nothing_is_written(tmp_path):
    quiet = create_logger("none", tmp_path)
    quiet.step(1, {"loss": 0.5})
    quiet.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_the_run_starts(monkeypatch):
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'umtrain\[tensorboard\]'"):
        logger.check_logger("tensorboard")


def test_a_run_shows_cases_of_each_validation_while_it_trains(slides, umtrain, tmp_path):
    small = ("model=resnet18", "res=64", "epochs=2", "dataset.workers=0", "precision=fp32")
    follow = ("cases=0", f"dataset.manifest={slides}", "run_dir=run", "logger=tensorboard")
    done = umtrain("fit", *small, *follow, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = tags(tmp_path / "run" / logger.FOLDER)
    drawn = [tag for tag in events.Tags()["images"] if tag.startswith("cases/val-")]
    assert drawn
    assert {event.step for tag in drawn for event in events.Images(tag)} == {4, 8}
    assert not (tmp_path / "run" / "cases").exists()
