"""Manifests and configurations that mean harm, and what must become of each: read, or refused.

Each is parsed as the commands parse it, in this process: what ends it ends the count.
"""

import contextlib
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
import psutil
import torch
from torch import nn

from umtrain.checkpoint import load_checkpoint, save_checkpoint
from umtrain.config import load_config
from umtrain.data.manifest import read_manifest
from umtrain.errors import ConfigError, ManifestError, RunError, UmtrainError
from umtrain.models.pretrained import load_pretrained
from umtrain.run_dir import read_run_config
from umtrain.units import format_bytes

# Of damage at random: that it is noticed is not certain, that it does no harm is.
_EITHER = ""
_HEADER = "slide_id,patient_id,path,label,split"
_ROW = "s1,p1,a.svs,1,train"
_TABLE = f"{_HEADER}\n{_ROW}\n"


def _row(cell: str, column: int = 0) -> bytes:
    cells = _ROW.split(",")
    cells[column] = '"' + cell.replace('"', '""') + '"'
    return f"{_HEADER}\n{','.join(cells)}\n".encode()


MANIFESTS: dict[str, tuple[bytes, str]] = {
    "byte order mark": (b"\xef\xbb\xbf" + _TABLE.encode(), "read"),
    "CRLF": (_TABLE.replace("\n", "\r\n").encode(), "read"),
    "CR alone": (_TABLE.replace("\n", "\r").encode(), "read"),
    "markup in an id": (_row("<script>alert(1)</script>"), "read"),
    "separators in an id": (_row("../../../etc/cron.d/x"), "read"),
    "an id that is a negative number": (_row("-12"), "read"),
    "accents and 漢字": (_row("Fräulein 漢字"), "read"),
    "an id of 100 000 characters": (_row("x" * 100_000), "read"),
    "UTF-16": (_TABLE.encode("utf-16"), "refused"),
    "UTF-16 without its mark": (_TABLE.encode("utf-16-le"), "refused"),
    "Latin-1": (_TABLE.replace("p1", "Müller").encode("latin-1"), "refused"),
    "NUL byte": (_TABLE.replace("s1", "s\0").encode(), "refused"),
    "nothing": (b"", "refused"),
    "a header alone": (f"{_HEADER}\n".encode(), "refused"),
    "zeros": (bytes(100_000), "refused"),
    "an image": (bytes(range(256)) * 100, "refused"),
    "quote without end": (f'{_HEADER}\n"s1,p1,a.svs,1,train\n'.encode() * 50, "refused"),
    "a field of a megabyte": (_row("x" * 2**20), "refused"),
    "100 000 columns": (("," * 100_000 + "\n").encode(), "refused"),
    "a column twice": (_TABLE.replace("split\n", "split,split\n").encode(), "refused"),
    "an id twice": ((_TABLE + _ROW + "\n").encode(), "refused"),
    "a patient in two splits": ((_TABLE + "s2,p1,b.svs,1,test\n").encode(), "refused"),
    "a path that climbs out": (_row("../../etc/passwd", 2), "refused"),
    "a path that climbs out late": (_row("a/../../etc/passwd", 2), "refused"),
    "a path with a line break": (_row("a\nb.svs", 2), "refused"),
    "terminal escapes in an id": (_row("\x1b[2J\x1b]0;x\x07"), "refused"),
    "an id written backwards": (_row("a\u202egpj.exe"), "refused"),
    "formula": (_row("=cmd|' /C calc'!A0"), "refused"),
    "formula with +": (_row("+1+cmd|' /C calc'!A0"), "refused"),
    "formula with -": (_row("-1+1"), "refused"),
    "formula with @": (_row("@SUM(1+1)"), "refused"),
    "formula after a space": (_row(" =1+1"), "refused"),
    "not a number": (f"{_HEADER},mpp\n{_ROW},nan\n".encode(), "refused"),
    "1e999": (f"{_HEADER},mpp\n{_ROW},1e999\n".encode(), "refused"),
    "10 000 nines": (f"{_HEADER},mpp\n{_ROW},{'9' * 10_000}\n".encode(), "refused"),
    "Arabic digits": (f"{_HEADER},mpp\n{_ROW},٣\n".encode(), "refused"),
}

OVERRIDES: dict[str, list[str]] = {
    "the environment": ["seed=${oc.env:HOME}"],
    "the environment in a path": ["run_dir=runs/${oc.env:USER}"],
    "another key": ["res=${batch_size}"],
    "a resolver with code": ["res=${eval:1+1}"],
    "_target_": ["model._target_=os.system"],
    "_target_ at the root": ["_target_=os.system"],
    "_target_ in a value": ["memory.cpu_layers={_target_:os.system,_args_:[ls]}"],
    "Hydra's own keys": ["hydra.run.dir=/tmp/x"],
    "a group from elsewhere": ["model=../../../etc/passwd"],
    "a package": ["+model@_global_=resnet50"],
    "a key removed": ["~model"],
    "a million digits": ["seed=" + "9" * 1_000_000],
    "a long text": ["res=" + "x" * 1_000_000],
    "deep nesting": ["memory.cpu_layers=" + "[" * 2000 + "]" * 2000],
    "2**63 pixels": ["res=4294967296"],
    "a batch of 10**18": ["batch_size=1000000000000000000"],
    "10**30 workers": ["dataset.workers=" + "1" + "0" * 30],
    "negative": ["epochs=-1"],
    "infinite": ["optim.lr=inf"],
    "not a number": ["optim.lr=nan"],
    "a budget of 400 digits": ["memory.device_budget=" + "9" * 400 + "GiB"],
    "a share above all": ["dataset.max_bad_fraction=2"],
    "no time": ["dataset.read_timeout_s=0"],
    "a NUL byte": ["run_dir=a\0b"],
    "a list": ["res=[1,2]"],
    "a function": ["res=extend_list(1,2)"],
    "files of the disk": ["res=glob(/*)"],
}

RUN_CONFIGS: dict[str, str] = {
    "a Python object": "!!python/object/apply:os.system [touch PWNED]",
    "a Python object in a key": "res: !!python/object/apply:os.system [touch PWNED]",
    "a Python name": "model: !!python/name:os.system",
    "an unknown tag": "res: !x 1",
    "_target_": "model: {name: resnet50, _target_: os.system}",
    "an alias of an alias, 30 deep": "res: [&a0 [x], "
    + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    + "]",
    "itself": "&a {model: *a}",
    "deep nesting": "[" * 20_000,
    "a list": "[1, 2]",
    "a number": "1",
    "nothing": "",
    "bytes": "\x00\x01",
    "groups that are texts": "dataset: wsi\nmodel: resnet50\nmemory: vanilla\noptim: adamw",
    "interpolation": "res: ${oc.env:HOME}",
}


class _Touches:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._path,)


def manifests() -> tuple[Counter[str], list[str]]:
    """Return how many of the manifests were read and refused, and what came out otherwise."""
    tried = {
        name: (expected, lambda folder, content=content: _read_manifest(folder, content))
        for name, (content, expected) in MANIFESTS.items()
    }
    return _tried("manifest", tried)


def configs() -> tuple[Counter[str], list[str]]:
    """Return the same of overrides, of runs' config.yaml, and of checkpoints."""
    tried: dict[str, tuple[str, Callable[[Path], object]]] = {}
    for name, words in OVERRIDES.items():
        tried[f"override: {name}"] = ("refused", lambda folder, words=words: load_config(words))
    for name, text in RUN_CONFIGS.items():
        tried[f"config.yaml: {name}"] = (
            "refused",
            lambda folder, text=text: _read_run_config(folder, text),
        )
    for number, mutate in enumerate(mutations.ANY * 5):
        tried[f"checkpoint: {mutate.__name__} {number}"] = (
            _EITHER,
            lambda folder, mutate=mutate, number=number: _load_damaged(folder, mutate, number),
        )
    tried["checkpoint: a pickle that acts"] = ("refused", lambda folder: _load(folder, _pickled))
    tried["checkpoint: one in torch's format"] = ("refused", lambda folder: _load(folder, _saved))
    return _tried("config", tried)


def _tried(
    kind: str, tried: dict[str, tuple[str, Callable[[Path], object]]]
) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    wrong = []
    for name, (expected, attempt) in tried.items():
        with tempfile.TemporaryDirectory() as folder:
            found, text = _outcome(attempt, Path(folder))
            if (Path(folder) / "PWNED").exists() or Path("PWNED").exists():
                found = "unexplained"
        counts[found] += 1
        allowed = ("read", "refused") if expected == _EITHER else (expected,)
        if found not in allowed or len(text) > 5000:
            wrong.append(f"{kind}, {name}: {found}: {text[:300]}")
    return counts, wrong


def _outcome(attempt: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    try:
        attempt(folder)
    except (ConfigError, ManifestError, RunError) as error:
        return "refused", str(error)
    except UmtrainError as error:
        return "unexplained", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "unexplained", f"{type(error).__name__}: {str(error)[:300]}"
    return "read", ""


def _read_manifest(folder: Path, content: bytes) -> None:
    (folder / "m.csv").write_bytes(content)
    read_manifest(folder / "m.csv", "wsi")


def _read_run_config(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text.replace("PWNED", str(folder / "PWNED")))
    read_run_config(folder, {})


def _load(folder: Path, write: Callable[[Path, object], None]) -> None:
    write(folder / "best.pt", {"model": _Touches(folder / "PWNED")})
    load_checkpoint(folder / "best.pt")


def _load_damaged(folder: Path, mutate: mutations.Mutation, seed: int) -> None:
    """Load a checkpoint, and pretrained weights, whose file was damaged."""
    model = nn.Linear(64, 64)
    path = folder / "best.pt"
    save_checkpoint(path, {"model": model.state_dict(), "epoch": 1})
    path.write_bytes(mutate(path.read_bytes(), np.random.default_rng(seed)))
    with contextlib.suppress(ConfigError):
        load_pretrained(model, path, head="none")
    load_checkpoint(path)


def _pickled(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value))


def _saved(path: Path, value: object) -> None:
    torch.save(value, path)


def large_manifest(n_rows: int) -> dict[str, float]:
    """Return what reading a manifest of `n_rows` takes: seconds, and memory of this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.csv"
        with path.open("w", encoding="utf-8") as stream:
            stream.write(_HEADER + "\n")
            stream.writelines(
                f"slide_{n:07d},patient_{n // 2:07d},slides/slide_{n:07d}.svs,{n % 2},train\n"
                for n in range(n_rows)
            )
        before_bytes, started_s = psutil.Process().memory_info().rss, time.monotonic()
        manifest = read_manifest(path, "wsi")
        taken_s = time.monotonic() - started_s
        memory_bytes = psutil.Process().memory_info().rss - before_bytes
        assert len(manifest.records) == n_rows, format_bytes(memory_bytes)
    return {"rows": n_rows, "seconds": taken_s, "memory_bytes": memory_bytes}
