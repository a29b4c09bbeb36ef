"""What can be configured, composed by Hydra and checked in one place before any work starts.

The dataclasses are the schema: their metadata feeds `umtrain COMMAND --help`, tab completion and
the messages about unknown keys. Hydra and OmegaConf are imported only when a config is composed.
"""

import dataclasses
import difflib
import math
import re
import shlex
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umtrain.errors import ConfigError
from umtrain.units import parse_bytes

CHOICES = {
    "approach": ("no_fuss", "two_stage"),
    "dataset.fit": ("resize", "pad", "crop"),
    "model.norm": ("batch", "frozen", "group"),
    "model.pool": ("avg", "max", "avgmax"),
    "memory.grouping": ("blocks", "equal"),
    "memory.policy": ("all", "conv"),
    "optim.schedule": ("cosine", "plateau", "constant"),
    "optim.class_weights": ("balanced", "none"),
    "precision": ("auto", "fp32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "parallel": ("data", "spatial"),
    "logger": ("none", "tensorboard"),
    "on_nan": ("stop", "skip"),
}
# What resume= takes beside a path.
RESUME_WORDS = ("auto", "never")
GROUPS = ("dataset", "model", "memory", "optim")
# What a folder of conf/ sets other keys for: the groups, and a root key that is chosen like one.
_CHOSEN = (*GROUPS, "approach")
_MODEL_TASKS = {
    "resnet18": "wsi",
    "resnet50": "wsi",
    "resnet101": "wsi",
    "resunet35": "spine",
    "resnet18_3d": "ct",
    "resnet101_3d": "ct",
}
RES_MULTIPLE_PX = 64
_N_SHOWN_CHARACTERS = 200
# Far beyond what any machine holds, far below where the arithmetic of sizes overflows.
MOST_PIXELS = 2**45
_MOST = 2**31 - 1
# Rows of the network's input. Of a radiograph with fewer the deepest map is a single pixel, which
# has no spread to normalise by; of a volume that depends on its slices too.
LEAST_RES = {"wsi": 64, "spine": 128, "ct": 32}
# Slices, and rows and columns, that the deepest map of a 3D network makes one position of.
_CT_STRIDES = (16, 32, 32)
_CT_KEYS = ("depth", "spacing_mm", "window_center", "window_width")


def _key(help_text: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from and how the network sees them."""

    name: str = _key("dataset kind")
    manifest: str | None = _key("CSV of images; null: synthetic demo data, made once", None)
    root: str | None = _key("folder that the manifest's paths start from; null: its own", None)
    fit: str = _key("whole image, or at a given mpp padded or cropped to res", "resize")
    mpp: float | None = _key("microns per pixel for fit=pad, fit=crop and patches", None)
    aspect: float = _key("network width / height", 1.0)
    positive: str | None = _key("label that counts as positive; null: the last in order", None)
    augment: bool = _key("random flips, turns, stain or intensity jitter in training", True)
    workers: int = _key("processes that read ahead while a step trains", 1)
    read_timeout_s: float = _key("seconds that reading one image may take", 600.0)
    max_bad_fraction: float = _key("share of a split that may be left out as unreadable", 0.05)
    depth: int | None = _key("slices of the volume the network sees, for ct", None)
    spacing_mm: float | None = _key(
        "width of a voxel, for ct, cropped or padded; null: the grid spans the volume", None
    )
    window_center: float | None = _key("Hounsfield units, for ct; a manifest's win", None)
    window_width: float | None = _key("Hounsfield units from black to white, for ct", None)
    patches_per_slide: int | None = _key(
        "patches drawn from a slide each epoch, for approach=two_stage", None
    )


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = _key("network")
    norm: str = _key("normalisation layers", "batch")
    pool: str | None = _key("global pooling of a classifier; null: avgmax", None)
    pretrained: str | None = _key("torch.save file of weights to start from", None)
    sync_batchnorm: bool = _key("batch norm over the images of all processes", False)


@dataclass(frozen=True)
class MemoryConfig:
    """The memory strategy and its budgets."""

    name: str = _key("strategy")
    device_budget: str | None = _key("device memory for training, e.g. 2GiB; null: all", None)
    host_budget: str | None = _key("host memory for swapped data; null: what there is", None)
    spill_dir: str | None = _key("folder of the spill file; null: the system's temporary one", None)
    grouping: str = _key("groups by network blocks or by equal working set", "blocks")
    group_bytes: str | None = _key("largest working set of a group; null: derived", None)
    prefetch_depth: int = _key("groups asked for ahead of use in backward", 2)
    policy: str = _key("which layers' inputs vdnn offloads", "all")
    cpu_layers: tuple[str, ...] = _key("layers that placement puts on the CPU, [layer1]", ())
    oversubscribe: bool = _key("let um* take more managed memory than the GPU has free", False)
    show_groups: bool = _key("print the groups and their working sets", False)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = _key("optimizer")
    lr: float = _key("peak learning rate")
    weight_decay: float = _key("weight decay", 0.0)
    momentum: float = _key("momentum of SGD", 0.9)
    schedule: str = _key("learning rate after warm-up", "cosine")
    warmup_fraction: float = _key("share of steps with a rising rate (none with plateau)", 0.1)
    accumulate: int = _key("batches whose gradients add up to one step", 1)
    clip_norm: float | None = _key("largest gradient norm; null: no clipping", None)
    class_weights: str = _key("weigh classes by their frequency in training", "balanced")


@dataclass(frozen=True)
class RunConfig:
    """One run, complete."""

    dataset: DatasetConfig
    model: ModelConfig
    memory: MemoryConfig
    optim: OptimConfig
    approach: str = _key("whole slides, or patches and then slides (needs masks)", "no_fuss")
    res: int = _key("rows of the square the network sees, in pixels", 1024)
    batch_size: int = _key("images (or patches) per batch", 1)
    epochs: int = _key("passes over the training split", 10)
    max_steps: int | None = _key("stop after this many steps; null: by epochs", None)
    precision: str = _key("auto: bf16 where the device has it and gets it right, else fp32", "auto")
    device: str = _key("auto: the GPU if there is one", "auto")
    parallel: str = _key("several processes share the images, or the rows of each image", "data")
    seed: int = _key("seed of weights, order and augmentation", 0)
    cases: int = _key("worst test images that are drawn, slides with Grad-CAM", 3)
    run_dir: str | None = _key("folder of the run; null: a new one in runs/", None)
    resume: str = _key("auto: go on with what is in run_dir; never; or a run or checkpoint", "auto")
    checkpoint_minutes: float = _key("a long epoch is saved this often", 10.0)
    signal_grace_s: float = _key("seconds that a step may take to end after SIGTERM", 30.0)
    on_nan: str = _key("a loss that is no number: stop, or skip its update", "stop")
    trace: bool = _key("write trace.json and timeline.png of one step", False)
    logger: str = _key("dashboard that follows the run", "none")


def conf_dir() -> Path:
    """Return the folder of YAML groups: inside the installed package, or the checkout's conf/."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "conf"


def group_options(group: str) -> list[str]:
    """Return the names that `group=` takes, from the YAML files that exist."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def schema_keys() -> dict[str, dataclasses.Field[Any]]:
    """Return every configurable key in dotted form with its dataclass field."""
    keys: dict[str, dataclasses.Field[Any]] = {}
    hints = typing.get_type_hints(RunConfig)
    for root in dataclasses.fields(RunConfig):
        if root.name in GROUPS:
            for leaf in dataclasses.fields(hints[root.name]):
                if leaf.name != "name":
                    keys[f"{root.name}.{leaf.name}"] = leaf
        else:
            keys[root.name] = root
    return keys


def load_config(overrides: list[str]) -> RunConfig:
    """Compose `key=value` overrides over conf/ into a checked RunConfig.

    Raises ConfigError for unknown keys or options, wrong types, values or combinations.
    """
    _check_overrides(overrides)
    # Keys are checked above; "++" sets them whether or not a YAML file spells out their default.
    composable = [text if text.split("=")[0] in _CHOSEN else f"++{text}" for text in overrides]
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("config", overrides=composable)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    config = config_from_dict(typing.cast(dict[str, Any], values))
    _check_files(config)
    return config


def override_values(overrides: list[str]) -> dict[str, Any]:
    """Return the keys and groups that `key=value` overrides name, with the values they give.

    Raises ConfigError for unknown keys, options of groups, and several values.
    """
    _check_overrides(overrides)
    parsed = map(_parse_override, overrides)
    return {override.key_or_group: override.value() for override in parsed}


def sweep_axes(overrides: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split overrides into the swept ones, key to values in order, and the fixed ones.

    Raises ConfigError if nothing is swept or an override does not parse.
    """
    axes: dict[str, list[str]] = {}
    fixed = []
    for text in overrides:
        override = _parse_override(text)
        if override.is_sweep_override():
            # A value given twice is one job.
            axes[override.key_or_group] = list(dict.fromkeys(override.sweep_string_iterator()))
        else:
            fixed.append(text)
    if not axes:
        raise ConfigError("nothing to sweep; give a key several values, e.g. res=256,512,768,1024")
    return axes, fixed


def quoted(text: str) -> str:
    """Return `text` as an override's value that Hydra reads back unchanged, whatever it holds."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Turn plain values (a composed config or a run's config.yaml) into a checked RunConfig."""
    config: RunConfig = _build(RunConfig, values, "")
    check_config(config)
    return config


def typed_group(schema: type[Any], path: Path, changes: dict[str, str], prefix: str) -> Any:
    """Return the dataclass `schema` with the values of a YAML file, `changes` as typed words.

    `prefix` names the keys in messages. Raises ConfigError for unknown keys and wrong types.
    """
    import yaml

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values |= {key: yaml.safe_load(text) for key, text in changes.items()}
    return _build(schema, values, prefix)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return `config` as plain values, as config.yaml holds it."""
    values = dataclasses.asdict(config)
    values["memory"]["cpu_layers"] = list(config.memory.cpu_layers)
    return values


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Return what tells runs apart in a record."""
    return {
        "dataset": config.dataset.name,
        "model": config.model.name,
        "approach": config.approach,
        "res": config.res,
        "batch_size": config.batch_size,
        "memory": config.memory.name,
        "precision": config.precision,
        "device": config.device,
        "seed": config.seed,
    }


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for any value or combination that could not run, before data is touched."""
    _check_choices(config)
    _check_numbers(config)
    _check_combinations(config)


def _check_overrides(overrides: list[str]) -> None:
    known = list(schema_keys())
    for text in overrides:
        if "${" in text:
            raise ConfigError(
                f"{_cut(text)}: a value is taken as it is, and ${{…}} would be looked up, in the "
                "environment for example; write what it stands for"
            )
        override = _parse_override(text)
        key = override.key_or_group
        if key not in known and key not in GROUPS:
            raise ConfigError(_unknown("key", key, [*GROUPS, *known]))
        if override.is_sweep_override():
            if Path(text.partition("=")[2]).expanduser().exists():
                raise ConfigError(f"{text}: quote a path with commas: {_in_shell(text)}")
            raise ConfigError(
                f"{text}: one run takes one value; for several use `umtrain sweep {text}`"
            )
        if key in _CHOSEN and str(override.value()) not in group_options(key):
            raise ConfigError(_unknown(f"{key}", str(override.value()), group_options(key)))


def _cut(value: object) -> str:
    """Return a value as a message shows it: the first of a long one, no items of a nested one."""
    text = str(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= _N_SHOWN_CHARACTERS else f"{text[:_N_SHOWN_CHARACTERS]}…"


def _parse_override(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text.startswith(("~", "+")):
        raise ConfigError(f"{text}: keys cannot be added or removed; write key=value")
    _, equals, value = text.partition("=")
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        if equals and value:
            hint = f"quote a value with special characters: {_cut(_in_shell(text))}"
        else:
            hint = "write key=value, for example res=1024"
        raise ConfigError(f"{_cut(text)!r} is not an override; {hint}") from error


def _in_shell(text: str) -> str:
    """Return the override as one types it in a shell, its value quoted for Hydra."""
    key, _, value = text.partition("=")
    return shlex.quote(f"{key}={quoted(value)}")


def _unknown(what: str, got: str, options: list[str]) -> str:
    near = [option for option in options if option.split(".")[-1] == got]
    if not near:
        near = difflib.get_close_matches(got, options, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    kind = "unknown key" if what == "key" else f"unknown {what}"
    return f"{kind} {_cut(got)!r}.{hint}\nPossible: {', '.join(options)}"


def _build(schema: type[Any], values: dict[str, Any], prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the configuration'}: expected keys and values")
    hints = typing.get_type_hints(schema)
    names = [item.name for item in dataclasses.fields(schema)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(_unknown("key", prefix + unknown[0], [prefix + name for name in names]))
    missing = [
        item.name
        for item in dataclasses.fields(schema)
        if item.default is dataclasses.MISSING and item.name not in values
    ]
    if missing:
        raise ConfigError(f"missing key {prefix}{missing[0]}")
    built = {
        name: _build(hints[name], value, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _convert(prefix + name, value, hints[name])
        for name, value in values.items()
    }
    return schema(**built)


def _convert(key: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{key}={_cut(value)}: expected a list of names, e.g. {key}=[a,b]")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    if target is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if target is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is target:
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{key}={_cut(value)}: expected {expected[target]}")


def _check_choices(config: RunConfig) -> None:
    for key, options in CHOICES.items():
        value = _value(config, key)
        if value is not None and value not in options:
            raise ConfigError(_unknown(key, str(value), list(options)))
    for group in GROUPS:
        name = _value(config, f"{group}.name")
        if name not in group_options(group):
            raise ConfigError(_unknown(group, name, group_options(group)))


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_numbers(config: RunConfig) -> None:
    at_least = {
        "res": LEAST_RES[config.dataset.name],
        "batch_size": 1,
        "epochs": 1,
        "cases": 0,
        "dataset.workers": 0,
        "memory.prefetch_depth": 0,
        "optim.accumulate": 1,
        "optim.weight_decay": 0,
    }
    for key in ("max_steps", "dataset.patches_per_slide", "dataset.depth"):
        if _value(config, key) is not None:
            at_least[key] = 1
    for key, least in at_least.items():
        if _value(config, key) < least:
            raise ConfigError(f"{key}={_cut(_value(config, key))}: must be at least {least}")
        if _value(config, key) > _MOST:
            raise ConfigError(f"{key}={_cut(_value(config, key))}: must be at most {_MOST}")
    if config.batch_size * config.res**2 > MOST_PIXELS:
        raise ConfigError(
            f"res={config.res} batch_size={config.batch_size}: a batch of more than {MOST_PIXELS} "
            "pixels is beyond every memory; choose smaller ones"
        )
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must be at least 0 and below 2**63")
    positive = ["optim.lr", "dataset.aspect", "dataset.mpp", "optim.clip_norm"]
    positive.append("dataset.read_timeout_s")
    positive += ["dataset.spacing_mm", "dataset.window_width"]
    for key in positive:
        value = _value(config, key)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{key}={value}: must be more than 0, and finite")
    for key in ("checkpoint_minutes", "signal_grace_s"):
        if not 0 <= _value(config, key) < math.inf:
            raise ConfigError(f"{key}={_value(config, key)}: must be at least 0, and finite")
    if not 0 <= config.dataset.max_bad_fraction <= 1:
        raise ConfigError("dataset.max_bad_fraction: must be at least 0 and at most 1")
    if not 0 <= config.optim.warmup_fraction < 1:
        raise ConfigError("optim.warmup_fraction: must be at least 0 and below 1")
    for key in ("memory.device_budget", "memory.host_budget", "memory.group_bytes"):
        if _value(config, key) is not None:
            parse_bytes(_value(config, key), key)


def _check_combinations(config: RunConfig) -> None:
    dataset, model = config.dataset, config.model
    _check_approach(config)
    _check_ignored(config)
    _check_parallel(config)
    if _MODEL_TASKS[model.name] != dataset.name:
        fitting = [name for name, task in _MODEL_TASKS.items() if task == dataset.name]
        raise ConfigError(
            f"model={model.name} does not fit dataset={dataset.name}; use model={'|'.join(fitting)}"
        )
    if dataset.name == "wsi" and dataset.fit != "resize" and dataset.mpp is None:
        raise ConfigError(
            f"dataset.fit={dataset.fit} needs dataset.mpp (microns per pixel), e.g. dataset.mpp=1.0"
        )
    if dataset.name == "wsi" and dataset.aspect != 1:
        raise ConfigError("dataset.aspect: slides are read as squares; leave it at 1")
    if dataset.name == "spine" and config.res % RES_MULTIPLE_PX:
        near = max(LEAST_RES[dataset.name], round(config.res / RES_MULTIPLE_PX) * RES_MULTIPLE_PX)
        raise ConfigError(
            f"res={config.res}: {model.name} halves the image six times; use a multiple of "
            f"{RES_MULTIPLE_PX}, for example res={near}"
        )
    if dataset.name == "ct":
        _check_volume(config)
    if model.pool is not None and dataset.name == "spine":
        raise ConfigError(f"model.pool={model.pool}: {model.name} has no global pooling")
    if model.norm == "frozen" and model.pretrained is None:
        raise ConfigError(
            "model.norm=frozen keeps the statistics of pretrained weights; give "
            "model.pretrained=PATH, or use model.norm=batch or group"
        )


def _check_parallel(config: RunConfig) -> None:
    if config.parallel == "spatial" and config.memory.name != "stream":
        raise ConfigError(
            f"parallel=spatial spreads the rows of feature maps over processes, which only "
            f"memory=stream can, not memory={config.memory.name}; add memory=stream, or use "
            "parallel=data"
        )
    if config.model.sync_batchnorm and config.model.norm != "batch":
        raise ConfigError(
            f"model.sync_batchnorm=true: model.norm={config.model.norm} has no statistics of a "
            "batch; leave one of them out"
        )


def _check_volume(config: RunConfig) -> None:
    dataset = config.dataset
    for key in ("depth", "window_center", "window_width"):
        if getattr(dataset, key) is None:
            raise ConfigError(f"dataset.{key}: volumes need it; leave it out for the default")
    assert dataset.depth is not None
    if not math.isfinite(dataset.window_center or 0):
        raise ConfigError(f"dataset.window_center={dataset.window_center}: must be finite")
    shape = (dataset.depth, config.res, max(1, round(config.res * dataset.aspect)))
    if all(side <= stride for side, stride in zip(shape, _CT_STRIDES, strict=True)):
        raise ConfigError(
            f"res={config.res}, dataset.depth={dataset.depth}: the deepest map would be a single "
            f"position, which has no spread to normalise by; use dataset.depth={_CT_STRIDES[0] + 1}"
            f" or more, or res={_CT_STRIDES[1] + 1} or more"
        )


def _check_approach(config: RunConfig) -> None:
    dataset = config.dataset
    if config.approach == "no_fuss":
        if dataset.patches_per_slide is not None:
            raise ConfigError(
                "dataset.patches_per_slide: has no effect with approach=no_fuss; leave it out, or "
                "use approach=two_stage"
            )
        return
    if dataset.name != "wsi":
        raise ConfigError(
            f"approach=two_stage classifies patches of slides; dataset={dataset.name} has only "
            "approach=no_fuss"
        )
    if dataset.patches_per_slide is None:
        raise ConfigError(
            "dataset.patches_per_slide: approach=two_stage needs it, e.g. "
            "dataset.patches_per_slide=16"
        )
    if dataset.fit != "resize":
        raise ConfigError(
            f"dataset.fit={dataset.fit}: has no effect with approach=two_stage, whose patches "
            "cover the slide at dataset.mpp; leave it out"
        )


def _check_ignored(config: RunConfig) -> None:
    """Refuse keys that would have no effect: someone meant something by them."""
    dataset = config.dataset
    reads_whole = config.approach == "no_fuss" and dataset.fit == "resize"
    if config.memory.oversubscribe and config.device == "cpu":
        raise ConfigError("memory.oversubscribe: is about a GPU's managed memory; leave it out")
    if dataset.name == "wsi" and reads_whole and dataset.mpp is not None:
        raise ConfigError("dataset.mpp: has no effect with dataset.fit=resize; use pad or crop")
    keys = {"spine": ("fit", "mpp", "positive", *_CT_KEYS), "wsi": _CT_KEYS, "ct": ("fit", "mpp")}
    names = {"spine": "radiographs", "wsi": "slides", "ct": "volumes"}
    defaults = DatasetConfig(name=dataset.name)
    for key in keys[dataset.name]:
        if getattr(dataset, key) != getattr(defaults, key):
            raise ConfigError(
                f"dataset.{key}: {names[dataset.name]} have no such choice; leave it out"
            )


def _check_files(config: RunConfig) -> None:
    for key in ("dataset.manifest", "model.pretrained"):
        path = _value(config, key)
        if path is not None and not Path(path).expanduser().is_file():
            raise ConfigError(f"{key}={path}: no such file")
