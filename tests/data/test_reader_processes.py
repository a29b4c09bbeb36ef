"""What becomes of reader processes when the training process is gone."""

import subprocess
import sys
import time

import psutil

TRAIN = """
import sys
from umtrain.data.dataset import SlideDataset
from umtrain.data.loader import make_loader
from umtrain.data.manifest import read_manifest

if __name__ == "__main__":
    slides = read_manifest(sys.argv[1], "wsi").split("train")
    loader = make_loader(
        SlideDataset(slides, {"0": 0, "1": 1}, 64), 1, shuffle=False, workers=2
    )
    next(iter(loader))
    print("reading", flush=True)
    sys.stdin.read()
"""


def test_readers_end_with_a_trainer_that_is_killed(slides, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    trainer = subprocess.Popen(
        [sys.executable, script, slides], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "reading\n"
    family = psutil.Process(trainer.pid).children(recursive=True)
    assert len(family) >= 3  # the fork server and two readers
    trainer.kill()
    trainer.communicate()
    deadline_s = time.monotonic() + 60
    while any(member.is_running() for member in family) and time.monotonic() < deadline_s:
        psutil.wait_procs(family, timeout=1)
    assert not [member for member in family if member.is_running()]
