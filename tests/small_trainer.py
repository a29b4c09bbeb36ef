"""A trainer of small slides, for tests of what is around a network."""

import os
import signal

import torch
from torch import nn

from umtrain.config import load_config
from umtrain.console import Console
from umtrain.data.manifest import read_manifest
from umtrain.logger import RunLogger
from umtrain.memory import create
from umtrain.tasks.slides import SlideTask
from umtrain.training import Trainer

CPU = torch.device("cpu")
SMALL = (
    *("model=resnet18", "res=64", "dataset.workers=0", "epochs=2", "batch_size=2", "device=cpu"),
    "precision=fp32",
)


class SignalAfter(RunLogger):
    """Sends SIGTERM to this process while a step is being noted."""

    def __init__(self, number):
        self._number = number

    def step(self, number, scalars):
        if number == self._number:
            os.kill(os.getpid(), signal.SIGTERM)


class SmallTask(SlideTask):
    """A task whose network is small: what is tested is around it."""

    def create_model(self, pretrained=None):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, self.n_outputs)
        )


def make_task(slides, *overrides, kind=SlideTask):
    config = load_config([f"dataset.manifest={slides}", *SMALL, *overrides])
    return kind(config, read_manifest(slides, "wsi"))


def make_trainer(task, folder, logger=None, stop=None):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    strategy = create("vanilla")
    model = task.create_model()
    return Trainer(task, model, strategy, CPU, folder, Console(), logger or RunLogger(), stop=stop)
