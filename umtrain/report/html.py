"""report.html: one self-contained page of a run. Every string from outside is escaped."""

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from umtrain.console import format_duration
from umtrain.files import write_text
from umtrain.report.plots import Picture
from umtrain.report.record import Record
from umtrain.report.tables import quality, quality_name, run_rows

REPORT_NAME = "report.html"


def write_report(run_dir: Path, record: Record, pictures: list[Picture]) -> Path:
    """Write the page of one run, with its pictures inside, and return its path."""
    environment = Environment(
        loader=PackageLoader("umtrain.report"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("run.html").render(
        title=f"{record['dataset']} · {record['model']} · res {record['res']}",
        verdict=_verdict(record),
        rows=run_rows(record),
        pictures=[(picture.title, _data_uri(picture.path)) for picture in pictures],
        data=record["data"],
        reasons=record["reasons"],
        environment=record["environment"],
        settings={key: record[key] for key in ("memory", "precision", "device", "seed")},
    )
    path = run_dir / REPORT_NAME
    write_text(path, page)
    return path


def _verdict(record: Record) -> str:
    if record["status"] != "ok":
        return f"This run ended as {record['status']}: {record['reasons'].get('status', '')}"
    took = record.get("elapsed_s")
    length = f" after {format_duration(took)}" if took is not None else ""
    for split in ("test", "val"):
        if record[split]:
            found = f"{quality_name(record['dataset'])} {quality(record, split)}"
            return f"On {record[split]['n']} {split} images: {found}{length}."
    return f"Trained{length}; the manifest has no validation or test images."


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
