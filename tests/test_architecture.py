"""The directions in which packages may import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import umtrain

ROOT = Path(umtrain.__file__).parent
# What each part of the house may know of the rest of it.
GROUND = {"errors", "units", "files", "exchange", "processes", "compiler"}
ALLOWED = {
    "data": GROUND | {"data", "console"},
    "models": GROUND | {"models"},
    "streaming": GROUND | {"streaming"},
    "memory": GROUND | {"memory", "streaming"},
    "planning": GROUND | {"planning", "memory", "streaming", "config", "device"},
    "evaluation": GROUND | {"evaluation"},
    "report": GROUND | {"report", "console"},
    "config": GROUND,
    "tasks": GROUND | {"tasks", "config", "data", "models", "evaluation"},
    "parallel": GROUND | {"parallel", "config", "data", "models", "memory"},
}
CUDA_FILES = {"pool_cuda"}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(part):
    single = ROOT / f"{part}.py"
    return [single] if single.exists() else sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_it_may_know(part):
    parts = {path.stem for path in ROOT.iterdir()} - {"__init__", "__pycache__"}
    files = _files(part)
    assert files
    for path in files:
        for name in _imports(path):
            if name.startswith("umtrain.") and name.split(".")[1] in parts:
                assert name.split(".")[1] in ALLOWED[part], f"{path.name} imports {name}"


def test_only_the_cuda_files_of_memory_touch_cuda_bindings():
    for path in ROOT.rglob("*.py"):
        touches = {name.split(".")[0] for name in _imports(path)} & {"cupy", "cuda"}
        assert not touches or (path.parent.name == "memory" and path.stem in CUDA_FILES), path


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from umtrain.cli import main; main(['fit', '--help']);"
        "print(sorted({'torch', 'hydra', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["sweep", "comparison", "report_command"])
def test_what_only_starts_or_compares_runs_needs_no_torch(command):
    code = f"import sys, umtrain.{command}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
