"""What the benchmarks share: a cell that is a process of its own, and the document of all cells."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_cell_process(command: Sequence[str]) -> dict[str, object]:
    """Return the JSON of a process's last line; one that the system kills is out of memory."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"status": "oom", "why": f"the process ended by signal {-done.returncode}"}
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"status": "failed", "why": said[-1]}


def write_document(document: dict[str, object], out: Path | None) -> None:
    """Write the document as JSON to where `out` points, if it does."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(document, indent=1))
