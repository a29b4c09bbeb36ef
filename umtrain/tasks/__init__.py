"""What a dataset asks of a network: inputs, loss, predictions and figures of merit."""

from umtrain.config import RunConfig
from umtrain.tasks.base import AnyManifest, Row, Task
from umtrain.tasks.keypoints import KeypointTask
from umtrain.tasks.patches import PatchTask
from umtrain.tasks.slides import SlideTask
from umtrain.tasks.volumes import VolumeTask

__all__ = ["AnyManifest", "Row", "Task", "create", "without_images"]

_TASKS: dict[str, type[Task]] = {
    "wsi": SlideTask,
    "spine": KeypointTask,
    "ct": VolumeTask,
}


def create(config: RunConfig, manifest: AnyManifest) -> Task:
    """Return the task that `config.dataset` stands for, on the images of `manifest`."""
    return _TASKS[config.dataset.name](config, manifest)


def without_images(config: RunConfig) -> Task:
    """Return the task of `config` as far as it needs no image: to plan for it."""
    kind = PatchTask if config.approach == "two_stage" else _TASKS[config.dataset.name]
    return kind.without_images(config)
