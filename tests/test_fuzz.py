"""A seeded share of `scripts/fuzz_inputs.py`; the README has the counts of the whole."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_inputs.py"
KINDS = ("tiff", "svs", "dicom")


def test_damaged_files_and_hostile_texts_are_read_or_refused_and_nothing_else():
    n = 36
    done = subprocess.run(
        [sys.executable, SCRIPT, "--n", str(n), "--seed", "1", "--rows", "20000"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    counts = figures["outcomes"]
    for reader in ("data check", "loader"):
        assert sum(sum(counts[f"{kind}, {reader}"].values()) for kind in KINDS) == n
    assert all(of["unexplained"] == 0 for of in counts.values())
    # Damage is noticed in most files, and harmless in some.
    n_refused = sum(counts[f"{kind}, loader"]["refused"] for kind in KINDS)
    n_read = sum(counts[f"{kind}, loader"]["read"] for kind in KINDS)
    assert n_refused > n / 2
    assert n_read > 0
    assert counts["configs"]["read"] == 0
    assert counts["manifests"]["refused"] > counts["manifests"]["read"] > 0
    assert figures["large_manifest"]["rows"] == 20000
