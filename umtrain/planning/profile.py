"""What the planner knows of a machine: sizes, rates and costs, from a data sheet or measured here.

A named profile is a file of `conf/device_profile/`, each number with its source beside it. This
machine's own comes from `umtrain.planning.calibration`.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from umtrain.config import conf_dir, group_options
from umtrain.errors import ConfigError
from umtrain.planning.step import Convolution, Phase

GROUP = "device_profile"
# A pass over feature maps that no convolution is: its speed in bytes/s, as a share of memory's.
PASSES = (
    "elementwise",
    "in_place",
    "rectify_backward",
    "norm",
    "norm_backward",
    "pool",
    "upsample",
    "cast",
    "update",
)
# A convolution's share of the speed of a dense matrix product.
CONVOLUTIONS = ("1x1", "3x3", "large", "few_channels", "grouped", "depthwise")

_RATES = ("in_bytes_per_s", "out_bytes_per_s", "memory_bytes_per_s", "launch_s")


@dataclass(frozen=True)
class Migration:
    """How pages of managed memory, or of a mapped file, come on demand.

    A fault stops the kernels for `fault_s` and brings up to `n_faults` blocks of `block_bytes`.
    """

    block_bytes: int
    n_faults: int
    fault_s: float


@dataclass(frozen=True)
class ConvolutionSample:
    """A convolution that was timed: `flops` in `seconds`, forward or backward, in `dtype`.

    `scratch_bytes` is what it took beside its operands and results, None if that is not known.
    """

    dtype: str
    phase: Phase
    convolution: Convolution
    flops: float
    seconds: float
    scratch_bytes: int | None = None


@dataclass(frozen=True)
class PassSample:
    """A pass that was timed: `n_bytes` read and written in `seconds`."""

    kind: str
    dtype: str
    n_bytes: int
    seconds: float


@dataclass(frozen=True)
class CompositionSample:
    """How many times as long kernels with `n_bytes` of traffic take in a network as alone."""

    dtype: str
    n_bytes: int
    ratio: float


@dataclass(frozen=True)
class Profile:
    """A machine, as a plan sees it.

    Rates are those of one device. `out_bytes_per_s` and `in_bytes_per_s` are the link's between
    device memory and where swapped data rests: pinned host memory, or the spill file of a machine
    without a GPU, whose `device_bytes` is its RAM; a byte on the link costs the cores that compute
    `link_busy_s_per_byte` and a transfer on it, without a GPU, `transfer_s`; fresh memory, given
    back again, costs `first_touch_s_per_byte`.
    `matrix_flops_per_s` is by dtype; `efficiency` is a convolution's share of it by kind
    (`CONVOLUTIONS`), `backward_efficiency` the share of the forward speed that backward has;
    `pass_efficiency` (`PASSES`) is of `memory_bytes_per_s`. Samples of convolutions and passes,
    where a machine was calibrated, stand before all of these; those of composition multiply what
    these give. `device_names` are parts of the names that such a device gives itself.
    `has_page_pool` is whether the next buffers can use all that was freed
    (`umtrain.memory.page_pool`); it counts without a GPU.
    """

    name: str
    title: str
    kind: Literal["cpu", "cuda"]
    device_bytes: int
    host_bytes: int
    out_bytes_per_s: float
    in_bytes_per_s: float
    memory_bytes_per_s: float
    matrix_flops_per_s: dict[str, float]
    launch_s: float
    migration: Migration
    native_bf16: bool
    efficiency: dict[str, float] = field(default_factory=dict)
    backward_efficiency: float = 1.0
    pass_efficiency: dict[str, float] = field(default_factory=dict)
    first_touch_s_per_byte: float = 0.0
    link_busy_s_per_byte: float = 0.0
    transfer_s: float = 0.0
    n_devices: int = 1
    peer_bytes_per_s: float | None = None
    network_bytes_per_s: float | None = None
    device_names: tuple[str, ...] = ()
    has_page_pool: bool = True
    convolution_samples: tuple[ConvolutionSample, ...] = ()
    pass_samples: tuple[PassSample, ...] = ()
    composition_samples: tuple[CompositionSample, ...] = ()

    @property
    def leaves_holes(self) -> bool:
        """Return whether freed buffers leave holes in the heap, unless a budget gives them back."""
        return self.kind == "cpu" and not self.has_page_pool

    @cached_property
    def scratch_by_layer(self) -> dict[tuple[str, Phase], dict[Convolution, list[tuple[int, int]]]]:
        """Return, by dtype and phase, what layers took for maps of so many pixels, in order."""
        found: dict[tuple[str, Phase], dict[Convolution, dict[int, int]]] = {}
        for sample in self.convolution_samples:
            if sample.scratch_bytes is not None:
                layers = found.setdefault((sample.dtype, sample.phase), {})
                points = layers.setdefault(sample.convolution.layer, {})
                n_pixels = math.prod(sample.convolution.output)
                points[n_pixels] = max(points.get(n_pixels, 0), sample.scratch_bytes)
        return {
            key: {layer: sorted(points.items()) for layer, points in layers.items()}
            for key, layers in found.items()
        }

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes whose speed is known."""
        return tuple(self.matrix_flops_per_s)


def profile_names() -> list[str]:
    """Return the names of the profiles in conf/."""
    return group_options(GROUP)


def load_profile(name: str) -> Profile:
    """Return the profile `name` of conf/device_profile. Raises ConfigError if there is none."""
    if name not in profile_names():
        raise ConfigError(
            f"device={name} is no device that can be planned for; choose auto, cpu, cuda, "
            f"{', '.join(profile_names())}"
        )
    path = conf_dir() / GROUP / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return profile_from_dict({"name": name, **values}, path)


def profile_from_dict(values: dict[str, Any], path: Path) -> Profile:
    """Return the profile that a file's plain values stand for.

    Raises ConfigError, naming the file, for a missing, unknown or unfitting value.
    """
    try:
        profile = Profile(
            **values
            | {
                "migration": Migration(**values["migration"]),
                "convolution_samples": tuple(
                    map(_convolution_sample, values.get("convolution_samples", ()))
                ),
                "device_names": tuple(values.get("device_names", ())),
                "pass_samples": tuple(PassSample(**v) for v in values.get("pass_samples", ())),
                "composition_samples": tuple(
                    CompositionSample(**v) for v in values.get("composition_samples", ())
                ),
            }
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a device profile ({error})") from error
    _check(profile, path)
    return profile


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """Return `profile` as plain values, which `profile_from_dict` takes."""
    return dataclasses.asdict(profile)


def _convolution_sample(values: dict[str, Any]) -> ConvolutionSample:
    shape: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list | tuple) else value
        for key, value in values["convolution"].items()
    }
    return ConvolutionSample(**values | {"convolution": Convolution(**shape)})


def _check(profile: Profile, path: Path) -> None:
    if profile.kind not in ("cpu", "cuda"):
        raise ConfigError(f"{path}: kind={profile.kind}: must be cpu or cuda")
    for item in dataclasses.fields(profile):
        value = getattr(profile, item.name)
        values = value.values() if isinstance(value, dict) else [value]
        for number in values:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and number < 0:
                raise ConfigError(f"{path}: {item.name}={value}: must not be negative")
    for key in ("device_bytes", "host_bytes", *_RATES):
        value = getattr(profile, key)
        if not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{path}: {key}={value}: must be a number above 0")
    for name, known in (("efficiency", CONVOLUTIONS), ("pass_efficiency", PASSES)):
        given = getattr(profile, name)
        missing = [key for key in known if key not in given]
        unknown = [key for key in given if key not in known]
        has_samples = bool(profile.convolution_samples and profile.pass_samples)
        if unknown or (missing and not has_samples):
            raise ConfigError(f"{path}: {name}: expected {', '.join(known)}")
