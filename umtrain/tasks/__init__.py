"""What a dataset asks of a network: inputs, loss, predictions and figures of merit."""

from collections.abc import Callable
from typing import Any

from umtrain.config import RunConfig
from umtrain.tasks.base import AnyManifest, Row, Task
from umtrain.tasks.keypoints import KeypointTask
from umtrain.tasks.slides import SlideTask
from umtrain.tasks.volumes import VolumeTask

__all__ = ["AnyManifest", "Row", "Task", "create"]

_TASKS: dict[str, Callable[[RunConfig, Any], Task]] = {
    "wsi": SlideTask,
    "spine": KeypointTask,
    "ct": VolumeTask,
}


def create(config: RunConfig, manifest: AnyManifest) -> Task:
    """Return the task that `config.dataset` stands for, on the images of `manifest`."""
    return _TASKS[config.dataset.name](config, manifest)
