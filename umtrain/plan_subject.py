"""What `umtrain plan` and `umtrain limits` are about: a configuration's network on a device."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from umtrain import tasks
from umtrain.config import MOST_PIXELS, RunConfig, load_config
from umtrain.console import Console
from umtrain.data.frame import network_width_px
from umtrain.data.manifest import Kind, Split, read_manifest
from umtrain.device import resolve_device
from umtrain.errors import ConfigError
from umtrain.files import cache_folder
from umtrain.memory.allocator import recycle_large_buffers
from umtrain.memory.options import Options
from umtrain.optimization import N_STATES
from umtrain.planning.calibration import calibrated
from umtrain.planning.machine import free_profile
from umtrain.planning.profile import Profile, load_profile
from umtrain.planning.step import StepTrace
from umtrain.planning.subject import Subject
from umtrain.precision import choose_precision
from umtrain.training import input_dtype

_HERE = ("auto", "cpu", "cuda")
# The networks whose convolutions a calibration times, and at which sizes.
_TIMED = (("dataset=wsi", "model=resnet50"), ("dataset=spine",))
_TIMED_RES = {"cpu": (256, 1024), "cuda": (256, 1024, 4096)}
# A batch of images has images, channels, rows and columns; of volumes slices stand before rows.
_N_IMAGE_AXES, _ROWS_AXIS = 4, 2
_SPLITS: tuple[Split, ...] = ("train", "val")


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
    """The words of a command, told apart: those of a run, and where to plan for.

    `memory` is the one strategy that is asked about, None where several are.
    """

    overrides: tuple[str, ...]
    device: str
    aspect: float | None
    memory: str | None = None

    def checked(self, *more: str) -> RunConfig:
        """Return the configuration with `more` overrides. Raises ConfigError for a wrong one."""
        chosen = () if self.memory is None else (f"memory={self.memory}",)
        config = load_config([*self.overrides, *chosen, *more])
        if self.aspect is None:
            return config
        if config.batch_size * config.res**2 * self.aspect > MOST_PIXELS:
            raise ConfigError(
                f"res={config.res} dataset.aspect={self.aspect:g} batch_size={config.batch_size}: "
                f"a batch of more than {MOST_PIXELS} pixels is beyond every memory; choose smaller "
                "ones"
            )
        dataset = dataclasses.replace(config.dataset, aspect=self.aspect)
        return dataclasses.replace(config, dataset=dataset)

    def planned(self, profile: Profile, *more: str) -> Planned:
        """Return the configuration with `more` overrides, ready to be planned for."""
        return make_planned(self.checked(*more), profile)


def split_words(words: list[str], memory: str | None = None) -> Words:
    """Take from `words` what a run does not know: other devices, and slides that are no squares.

    `memory` is the one strategy that is asked about.

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
    return Words(tuple(overrides), device, aspect, memory)


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
    recycle_large_buffers(device.type)  # what is planned for is a process that trains
    with _progress(console) as progress:
        calibrated(
            device,
            cache_folder(),
            partial(timed_steps, device),
            spill_dir=spill_dir,
            again=again,
            progress=progress,
        )
    return free_profile(Options.parse(device=device.type, spill_dir=spill_dir))


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """Say that something is measured, once it is."""
    with ExitStack() as stack:
        bars: list[Any] = []

        def update(done: int, total: int, note: str) -> None:
            if not bars:
                console.say("measuring this machine, once (two or three minutes)")
                bars.append(stack.enter_context(console.task("calibrating", total)))
            bars[0].update(done, note)

        yield update


def timed_steps(device: torch.device) -> list[StepTrace]:
    """Return traces of the steps whose convolutions tell how fast a machine is."""
    profile = load_profile("generic_cpu")
    return [
        make_planned(load_config([*words, f"res={res}"]), profile).subject.trace()
        for words in _TIMED
        for res in _TIMED_RES[device.type]
    ]


def make_planned(config: RunConfig, profile: Profile) -> Planned:
    """Return what to plan for `config`; its network has no images and never computes."""
    precision = choose_precision(config, profile.kind, has_bf16=profile.native_bf16)
    with torch.device("meta"):
        model = tasks.without_images(config).create_model()
    # No weight is ever read, nor written: what is reserved for them takes no memory.
    return _planned(config, profile, precision, model.to_empty(device="cpu"))


def resized(planned: Planned, **changes: Any) -> Planned:
    """Return the same network on inputs of another `res` or `batch_size`, which are not checked."""
    values: dict[str, Any] = dict(changes)
    config = dataclasses.replace(planned.config, **values)
    return _planned(config, planned.profile, planned.precision, planned.subject.model)


def _planned(config: RunConfig, profile: Profile, precision: str, model: nn.Module) -> Planned:
    task = tasks.without_images(config)
    sample = _sample(task.sample_input(torch.device("meta"), input_dtype(precision)), config)
    return Planned(
        config=config,
        profile=profile,
        precision=precision,
        subject=Subject(model, sample, precision, n_states=N_STATES[config.optim.name]),
        input_shape=tuple(sample.shape[1:]),
        options=_options(config, profile),
    )


def _sample(sample: Tensor, config: RunConfig) -> Tensor:
    """Return the network's input in the frame that is planned for: slides may be no squares."""
    if config.dataset.name != "wsi" or config.dataset.aspect == 1:
        return sample
    width_px = network_width_px(config.res, config.dataset.aspect)
    return _with_side(sample, -1, width_px)


def with_rows(planned: Planned, n_rows: int) -> Planned:
    """Return the same network on a band of `n_rows` rows of the input; a volume's are slices."""
    band = _with_side(planned.subject.sample_batch, _ROWS_AXIS, n_rows)
    whole = planned.subject
    subject = Subject(whole.model, band, whole.precision, n_states=whole.n_states)
    return dataclasses.replace(planned, subject=subject, input_shape=tuple(band.shape[1:]))


def _with_side(sample: Tensor, axis: int, n_px: int) -> Tensor:
    shape = list(sample.shape)
    shape[axis] = n_px
    layout = torch.channels_last if len(shape) == _N_IMAGE_AXES else torch.channels_last_3d
    return torch.empty(shape, dtype=sample.dtype, device="meta", memory_format=layout)


def _options(config: RunConfig, profile: Profile) -> Options:
    chosen = {
        item.name: getattr(config.memory, item.name)
        for item in dataclasses.fields(config.memory)
        if item.name not in ("name", "show_groups")
    }
    return Options.parse(device=profile.kind, **chosen)


def n_images(config: RunConfig) -> tuple[dict[str, int] | None, str]:
    """Return how many images an epoch trains on ("train") and validates on ("val").

    By the manifest; None and why, if there is none. Of approach=two_stage they are patches.
    """
    dataset = config.dataset
    if dataset.manifest is None:
        return None, "without dataset.manifest it is not known how many images an epoch has"
    root = Path(dataset.root).expanduser() if dataset.root else None
    path = Path(dataset.manifest).expanduser()
    manifest = read_manifest(path, cast(Kind, dataset.name), root)
    if config.approach != "two_stage":
        return {split: len(manifest.split(split)) for split in _SPLITS}, ""
    with_mask = [slide for slide in manifest.split("val") if getattr(slide, "mask", None)]
    per_slide = dataset.patches_per_slide or 1
    return {
        "train": per_slide * len(manifest.split("train")),
        "val": per_slide * len(with_mask),
    }, ""
