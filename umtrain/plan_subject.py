"""What `umtrain plan` and `umtrain limits` are about: a configuration's network on a device."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from umtrain import tasks
from umtrain.config import RunConfig, load_config
from umtrain.console import Console
from umtrain.data.frame import network_width_px
from umtrain.data.manifest import Kind, read_manifest
from umtrain.device import resolve_device
from umtrain.errors import ConfigError
from umtrain.files import cache_folder
from umtrain.memory.options import Options
from umtrain.planning.calibration import calibrated
from umtrain.planning.machine import free_profile
from umtrain.planning.profile import Profile, load_profile
from umtrain.planning.step import StepTrace
from umtrain.planning.subject import Subject
from umtrain.training import input_dtype

_HERE = ("auto", "cpu", "cuda")
# The networks whose convolutions a calibration times, and at which sizes.
_TIMED = (("dataset=wsi", "model=resnet50"), ("dataset=spine",))
_TIMED_RES = (256, 1024)


@dataclass(frozen=True)
class Planned:
    """One configuration to plan for, with its network's input: channels, then sides in pixels."""

    config: RunConfig
    profile: Profile
    precision: str
    subject: Subject
    input_shape: tuple[int, ...]
    options: Options

    @property
    def title(self) -> str:
        """Return what is planned, in a few words."""
        sides = " x ".join(map(str, self.input_shape[1:]))
        config = self.config
        return f"{config.model.name}, {sides}, batch {config.batch_size}, {self.precision}"


@dataclass(frozen=True)
class Words:
    """The words of a command, told apart: those of a run, and where to plan for."""

    overrides: tuple[str, ...]
    device: str
    aspect: float | None

    def checked(self, *more: str) -> RunConfig:
        """Return the configuration with `more` overrides. Raises ConfigError for a wrong one."""
        config = load_config([*self.overrides, *more])
        if self.aspect is None:
            return config
        dataset = dataclasses.replace(config.dataset, aspect=self.aspect)
        return dataclasses.replace(config, dataset=dataset)

    def planned(self, profile: Profile, *more: str) -> Planned:
        """Return the configuration with `more` overrides, ready to be planned for."""
        return make_planned(self.checked(*more), profile)


def split_words(words: list[str]) -> Words:
    """Take from `words` what a run does not know: other devices, and slides that are no squares.

    Raises ConfigError for an aspect that is no positive number.
    """
    overrides, device, aspect = [], "auto", None
    is_slide = not any(word.startswith("dataset=") and word != "dataset=wsi" for word in words)
    for word in words:
        key, equals, value = word.partition("=")
        if key == "device" and equals:
            device = value
        elif key == "dataset.aspect" and equals and is_slide:
            aspect = _positive(word, value)
        else:
            overrides.append(word)
    return Words(tuple(overrides), device, aspect)


def _positive(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{word}: must be a number above 0: network width / height")
    return number


def resolve_profile(
    name: str, console: Console, *, again: bool = False, spill_dir: Path | None = None
) -> Profile:
    """Return the named profile, or this machine's, calibrating it once.

    Of this machine what counts is what is free now. Raises ConfigError for an unknown name and
    DeviceError where there is no such device here.
    """
    if name not in _HERE:
        if again:
            raise ConfigError(
                f"calibrate=true measures this machine; device={name} is a profile of another one"
            )
        return load_profile(name)
    device = resolve_device(name)
    with _progress(console) as progress:
        calibrated(
            device, cache_folder(), timed_steps, spill_dir=spill_dir, again=again, progress=progress
        )
    return free_profile(Options.parse(device=device.type, spill_dir=spill_dir))


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """Say that something is measured, once it is."""
    with ExitStack() as stack:
        bars: list[Any] = []

        def update(done: int, total: int, note: str) -> None:
            if not bars:
                console.say("measuring this machine, once (a minute or two)")
                bars.append(stack.enter_context(console.task("calibrating", total)))
            bars[0].update(done, note)

        yield update


def timed_steps() -> list[StepTrace]:
    """Return traces of the steps whose convolutions tell how fast a machine is."""
    profile = load_profile("generic_cpu")
    return [
        make_planned(load_config([*words, f"res={res}"]), profile).subject.trace()
        for words in _TIMED
        for res in _TIMED_RES
    ]


def make_planned(config: RunConfig, profile: Profile) -> Planned:
    """Return what to plan for `config`; its network has no images and never computes."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if profile.native_bf16 else "fp32"
    task = tasks.without_images(config)
    with torch.random.fork_rng(devices=()):
        model = task.create_model()
    sample = _sample(task.sample_input(torch.device("meta"), input_dtype(precision)), config)
    return Planned(
        config=config,
        profile=profile,
        precision=precision,
        subject=Subject(model, sample, precision),
        input_shape=tuple(sample.shape[1:]),
        options=_options(config, profile),
    )


def _sample(sample: Tensor, config: RunConfig) -> Tensor:
    """Return the network's input in the frame that is planned for: slides may be no squares."""
    if config.dataset.name != "wsi" or config.dataset.aspect == 1:
        return sample
    width_px = network_width_px(config.res, config.dataset.aspect)
    shape = (*sample.shape[:3], width_px)
    return torch.empty(shape, dtype=sample.dtype, device="meta", memory_format=torch.channels_last)


def with_rows(planned: Planned, n_rows: int) -> Planned:
    """Return the same network on a band of `n_rows` rows of the input."""
    whole = planned.subject.sample_batch
    shape = (*whole.shape[:-2], n_rows, whole.shape[-1])
    band = torch.empty(shape, dtype=whole.dtype, device="meta", memory_format=torch.channels_last)
    subject = Subject(planned.subject.model, band, planned.precision)
    return dataclasses.replace(planned, subject=subject, input_shape=tuple(shape[1:]))


def _options(config: RunConfig, profile: Profile) -> Options:
    chosen = {
        item.name: getattr(config.memory, item.name)
        for item in dataclasses.fields(config.memory)
        if item.name not in ("name", "show_groups")
    }
    return Options.parse(device=profile.kind, **chosen)


def n_train(config: RunConfig) -> tuple[int | None, str]:
    """Return how many images an epoch has, by the manifest; None and why, if there is none."""
    dataset = config.dataset
    if dataset.manifest is None:
        return None, "without dataset.manifest it is not known how many images an epoch has"
    root = Path(dataset.root).expanduser() if dataset.root else None
    path = Path(dataset.manifest).expanduser()
    manifest = read_manifest(path, cast(Kind, dataset.name), root)
    n_images = len(manifest.split("train"))
    if config.approach == "two_stage":
        n_images *= config.dataset.patches_per_slide or 1
    return n_images, ""
