"""The texts of `umtrain --help` and `umtrain COMMAND --help`, and bash completion.

Written from the schema and the files in conf/, without importing Hydra or torch.
"""

import textwrap
from dataclasses import dataclass
from typing import Any

from umtrain import __version__
from umtrain.config import CHOICES, GROUPS, group_options, schema_keys


@dataclass(frozen=True)
class Command:
    """What help says of a command."""

    usage: str
    summary: str
    details: str
    examples: tuple[str, ...]
    takes_config: bool


COMMANDS = {
    "fit": Command(
        "umtrain fit [key=value …]",
        "train, validate each epoch, evaluate the test split",
        "Writes a run directory: config.yaml, metrics.json, steps.csv, predictions.csv, "
        "checkpoints/, plots, report.html and log.txt. With no dataset.manifest it makes "
        "synthetic demo data once and trains on that. Interrupted or killed, it goes on with "
        "resume=DIR, or with the same command where that names run_dir.",
        (
            "umtrain fit dataset=wsi res=1024",
            "umtrain fit resume=runs/night",
            "umtrain fit dataset=spine res=512 epochs=20",
            "umtrain fit dataset=ct res=96 dataset.depth=32",
            "umtrain fit dataset=wsi dataset.manifest=slides.csv res=2048 precision=bf16",
        ),
        True,
    ),
    "sweep": Command(
        "umtrain sweep key=a,b[,…] [key=value …]",
        "fit the cross product of several values, each job in its own process",
        "A job that fails or runs out of memory is a row of the table. Run the same command again "
        "to continue: finished jobs are kept, unfinished ones resumed. Writes summary.csv, "
        "summary.json, summary.png and report.html.\n"
        "launcher=slurm submits the jobs to SLURM, each for a node with 8 GPUs; conf/launcher/"
        "slurm.yaml has what it asks for, launcher.partition=… and the like change it.",
        (
            "umtrain sweep res=256,512,768,1024",
            "umtrain sweep dataset=spine res=256,512 seed=0,1,2",
            "umtrain sweep res=4096,8192 launcher=slurm launcher.partition=gpu",
        ),
        True,
    ),
    "eval": Command(
        "umtrain eval [run=DIR] [split=test|val] [cases=N] [device=…] [precision=…] "
        "[dataset.manifest=CSV]",
        "evaluate the best checkpoint of a run; the newest run if none is named",
        "Updates metrics.json, predictions.csv and report.html of the run. dataset.manifest and "
        "dataset.root are for the same data in another place.",
        ("umtrain eval", "umtrain eval run=runs/night split=val"),
        False,
    ),
    "plan": Command(
        "umtrain plan [res=N[,N…]] [memory=STRATEGY|all|auto] [device=auto|cpu|cuda|PROFILE] "
        "[calibrate=true] [out=DIR] [key=value …]",
        "predict memory, traffic and time of each strategy, without training or data",
        "Says of every strategy, or of one, what a step takes, and which memory=auto would choose "
        "(memory=auto is all). Needs no manifest; with one it says what an epoch takes, its "
        "validation included. This machine is measured once, "
        "in two or three minutes, and the figures are kept; calibrate=true measures again. "
        "device= also takes a profile of another machine; dataset.aspect any shape of slide. "
        "Several values of res, or out=DIR, write plan.json and plan.png.\n"
        f"Profiles: {', '.join(group_options('device_profile'))}",
        (
            "umtrain plan res=4096",
            "umtrain plan res=1024,2048,4096,8192 device=a100_80gb precision=bf16",
            "umtrain plan res=100000 dataset.aspect=0.5 device=v100_node memory=stream",
        ),
        True,
    ),
    "limits": Command(
        "umtrain limits [of=res|batch_size] [measure=true] [memory=STRATEGY|all] "
        "[device=auto|cpu|cuda|PROFILE] [memory.device_budget=2GiB] [out=DIR] [key=value …]",
        "find the largest res or batch that fits, per strategy",
        "By prediction, or with measure=true by real steps on this machine, each try a process of "
        "its own. res goes in steps of 32 for slides, 64 for radiographs and 4 for volumes. Writes "
        "limits.json and limits.png.",
        (
            "umtrain limits memory.device_budget=2GiB",
            "umtrain limits of=batch_size res=512 model=resnet101 device=v100_32gb",
            "umtrain limits measure=true memory=lms memory.device_budget=1GiB",
        ),
        True,
    ),
    "report": Command(
        "umtrain report RUN [RUN …] [out=DIR]",
        "make the page of a run or a sweep again; compare several runs",
        "One run or sweep: draws its pictures and report.html from its records, without the "
        "images. Several runs: compares them, on the images that all have predictions for, with "
        "the first: curves in one figure, paired tests, every image, the same case side by side, "
        "time and memory; report.html and comparison.json land in out (runs/comparison-… if none "
        "is named).",
        (
            "umtrain report runs/night",
            "umtrain report runs/no_fuss runs/two_stage out=runs/no_fuss-two_stage",
        ),
        False,
    ),
    "data": Command(
        "umtrain data make|check|import …",
        "make synthetic data, check a manifest and its files, import other tables",
        "data make dataset=wsi|spine|ct [n=…] [size=…] [seed=0] [out=DIR]\n"
        "data check CSV [dataset=wsi|spine|ct] [root=DIR] [fit=pad|crop]\n"
        "data import TABLE slides=DIR out=CSV [seed=0] "
        "[format=camelyon16|panda|panda_isup|clam|simple]",
        (
            "umtrain data make dataset=wsi n=60 size=2048 out=slides",
            "umtrain data make dataset=ct n=60 size=160 out=ct",
            "umtrain data check slides/manifest.csv",
            "umtrain data import train.csv slides=/data/panda out=panda.csv",
        ),
        False,
    ),
    "doctor": Command(
        "umtrain doctor",
        "what this machine has, and what to do about what it lacks",
        "GPU and managed memory, processor, memory, spill disk, slide and radiograph codecs.",
        ("umtrain doctor",),
        False,
    ),
    "completion": Command(
        "umtrain completion bash",
        "print the script that completes commands and keys in bash",
        'Put  eval "$(umtrain completion bash)"  in ~/.bashrc.',
        ('eval "$(umtrain completion bash)"',),
        False,
    ),
}

_PLAN_VALUES = {
    "of": ("res", "batch_size"),
    "measure": ("true", "false"),
    "calibrate": ("true", "false"),
}


def overview() -> str:
    """Return the text of `umtrain --help`."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{item.summary}" for name, item in COMMANDS.items())
    return f"""umtrain {__version__}: train CNNs end to end on high-resolution medical images

Usage: umtrain COMMAND [key=value …]

Commands
{commands}

{_groups()}

Examples
  umtrain fit dataset=wsi res=1024
  umtrain sweep res=256,512,768,1024
  umtrain eval

`umtrain COMMAND --help` says more. Exit codes: 0 done, 2 wrong input, 3 out of memory,
130 interrupted, 1 a defect of umtrain."""


def command_help(name: str) -> str:
    """Return the text of `umtrain NAME --help`."""
    item = COMMANDS[name]
    details = "\n".join(
        textwrap.fill(line, 96, initial_indent="  ", subsequent_indent="  ")
        for line in item.details.splitlines()
    )
    parts = [f"Usage: {item.usage}", f"{item.summary.capitalize()}.\n\n{details}"]
    if item.takes_config:
        parts += [_groups(), _keys()]
    parts.append("Examples\n" + "\n".join(f"  {example}" for example in item.examples))
    return "\n\n".join(parts)


def _groups() -> str:
    lines = [f"  {group}={'|'.join(group_options(group))}" for group in GROUPS]
    return "Config groups\n" + "\n".join(lines)


def _keys() -> str:
    lines = []
    for key, item in schema_keys().items():
        options = f" ({'|'.join(CHOICES[key])})" if key in CHOICES else ""
        lines.append(f"  {key:<24}{item.metadata['help']}{options}")
    return "Keys\n" + "\n".join(lines)


def completion_script() -> str:
    """Return a bash script that completes commands, keys, options of groups and file names."""
    keys = [f"{key}=" for key in (*GROUPS, *schema_keys())]
    values: dict[str, Any] = {group: group_options(group) for group in GROUPS} | CHOICES
    values |= {key: ("true", "false") for key, item in schema_keys().items() if item.type is bool}
    values |= _PLAN_VALUES
    profiles = " ".join(group_options("device_profile"))
    cases = "\n".join(f"    {key}) words='{' '.join(v)}' ;;" for key, v in values.items())
    # Bash splits words at "=": the key of the value being typed is one or two words back.
    return f"""# bash completion of umtrain
_umtrain() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" key="" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{" ".join(COMMANDS)} --help --version' -- "$current"))
    return
  fi
  if [ "$current" = "=" ]; then
    key="${{COMP_WORDS[COMP_CWORD-1]}}"; current=""
  elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ]; then
    key="${{COMP_WORDS[COMP_CWORD-2]}}"
  fi
  case "$key" in
    "") words='{" ".join(keys)}'; compopt -o nospace ;;
{cases}
    *) COMPREPLY=($(compgen -f -- "$current")); return ;;
  esac
  case "${{COMP_WORDS[1]}}:$key" in
    plan:) words="$words calibrate= out=" ;;
    limits:) words="$words of= measure= calibrate= out=" ;;
    plan:device|limits:device) words="$words {profiles}" ;;
    plan:memory|limits:memory) words="$words all" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _umtrain umtrain"""
