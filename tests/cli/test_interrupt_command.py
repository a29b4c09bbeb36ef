"""Ctrl-C, as a terminal sends it: to a command and all that it has started."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest


def interrupt(folder, words, is_time):
    """Start a command, send Ctrl-C once `is_time(process)`; return its exit code and complaint."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # A shell's background job ignores the signal, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while process.poll() is None and not is_time(process):
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
        assert psutil.wait_procs(family, timeout=20)[1] == []
    finally:
        process.kill()
        process.wait()
    return process.returncode, complaint


def has_child(process, word):
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return any(word in " ".join(child.cmdline()) for child in children)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.fault("Ctrl-C while data is made", "exit 130, one line, nothing left")
def test_data_make_ends_with_its_processes_and_leaves_nothing(tmp_path):
    words = ("umtrain", "data", "make", "n=500", "size=4096", "out=made")
    code, complaint = interrupt(
        tmp_path, words, lambda process: has_child(process, "multiprocessing.spawn")
    )
    assert (code, complaint) == (130, "umtrain: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("Ctrl-C while files are checked", "exit 130, one line, nothing left")
def test_data_check_ends_with_its_readers_and_says_one_line(slides, tmp_path):
    rows = slides.read_text().splitlines()
    many = [row.replace("slides/", f"{slides.parent}/slides/").split(",") for row in rows[1:]]
    many = [[f"{i}-{row[0]}", f"{i}-{row[1]}", *row[2:]] for i in range(200) for row in many]
    (tmp_path / "many.csv").write_text("\n".join([rows[0], *map(",".join, many)]))
    code, complaint = interrupt(
        tmp_path,
        ("umtrain", "data", "check", "many.csv"),
        lambda process: has_child(process, "multiprocessing.forkserver"),
    )
    assert (code, complaint) == (130, "umtrain: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["many.csv"]


def test_an_interrupt_within_an_exec_has_the_exit_code_of_every_other(tmp_path):
    """As while a module that makes dataclasses is imported."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from umtrain import cli\n"
        "cli._COMMANDS['doctor'] = lambda words: exec('raise KeyboardInterrupt')\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "umtrain: interrupted\n")


@pytest.mark.parametrize("module", ["torch", "scipy"])
def test_an_interrupt_while_libraries_are_imported_ends_with_one_line(tmp_path, module):
    def imports(process):
        try:
            maps = psutil.Process(process.pid).memory_maps(grouped=True)
        except psutil.Error:
            return True
        return any(f"/{module}/" in each.path for each in maps)

    code, complaint = interrupt(tmp_path, ("umtrain", "fit", "res=64"), imports)
    assert (code, complaint) == (130, "umtrain: interrupted\n")
    assert list(tmp_path.iterdir()) == []
