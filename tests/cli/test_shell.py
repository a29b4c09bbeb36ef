"""The command line around the commands: help, completion, errors, the installed wheel."""

import subprocess
import sys
from pathlib import Path

import pytest

from umtrain.cli import main
from umtrain.config import group_options, schema_keys
from umtrain.texts import COMMANDS, completion_script

CHECKOUT = Path(__file__).parents[2]


def test_help_names_every_command_and_every_option(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert all(option in text for option in group_options("memory"))


def test_help_of_fit_explains_every_key(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for key, item in schema_keys().items():
        assert key in text
        assert item.metadata["help"] in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"\n  umtrain {command}" in capsys.readouterr().out.replace('eval "$(', "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "unknown command 'train'; commands: fit, sweep, eval"),
        (["eval", "split=tset"], "split=tset: choose val or test"),
        (["eval", "split=train"], "split=train: choose val or test"),
        (["doctor", "memory.spill_dir=/nowhere"], "memory.spill_dir=/nowhere: no such folder"),
        (["eval", "runs=x"], "Did you mean run=?"),
        (["eval", "run=nowhere"], "no such file; is nowhere a run"),
        (["data"], "umtrain data takes make, check or import"),
        (["data", "make", "n=many"], "n=many: expected a whole number of at least 1"),
        (["data", "check"], "needs a manifest"),
        (["data", "check", "nowhere.csv"], "nowhere.csv"),
        (["doctor", "please"], "'please' is not understood here"),
        (["completion", "fish"], "umtrain completion knows one shell"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_to_do(
    words, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _complete(*words):
    """Return what bash offers when tab is pressed after `words`, split as bash splits them."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"{completion_script()}\n"
        "compopt() { :; }\n"  # there is no line being edited here
        f"COMP_WORDS=(umtrain {quoted}); COMP_CWORD={len(words)}; _umtrain\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_keys_and_values():
    assert _complete("sw") == ["sweep"]
    assert _complete("fit", "memory.sp") == ["memory.spill_dir="]
    assert _complete("fit", "model", "=") == group_options("model")
    assert _complete("fit", "precision", "=", "b") == ["bf16"]


def test_doctor_says_what_is_there_and_what_to_do(umtrain, tmp_path):
    done = umtrain("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for subject in ("processor", "RAM", "GPU", "spill disk", "OpenSlide", "JPEG 2000"):
        assert subject in done.stdout


def test_the_wheel_runs_from_any_directory(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = ["pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)

    def run(*words):
        return subprocess.run(
            [sys.executable, site / "bin" / "umtrain", *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(site), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "dataset=ct|spine|wsi" in run("--help")
    assert "wrote made/manifest.csv (2 rows)" in run("data", "make", "n=2", "size=256", "out=made")
    assert (site / "umtrain" / "report" / "templates" / "run.html").exists()


def test_a_folder_that_cannot_be_written_is_named(slides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = [f"dataset.manifest={slides}", "res=64"]
    assert main(["fit", *given, "run_dir=file"]) == 2
    assert "run_dir=file is a file; name a folder" in capsys.readouterr().err
    assert main(["sweep", *given, "seed=0,1", "run_dir=file/below"]) == 2
    assert "run_dir=file/below: cannot be made" in capsys.readouterr().err
