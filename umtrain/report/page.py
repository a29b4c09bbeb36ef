"""What every page is made with: templates, pictures inside it, links to what lies beside it."""

import base64
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from umtrain.files import write_text
from umtrain.report.canvas import Absent, Panel

REPORT_NAME = "report.html"
# Base64 adds a third: a page stays below 6 MB, which a phone and a mail server take.
PICTURE_BUDGET_BYTES = 4 * 2**20
_MOST_CASES = 8
_INTERVAL = re.compile(r"\(?[\d.]+–[\d.]+\)?")


@dataclass(frozen=True)
class Shown:
    """A picture as a page has it: `uri` if it is inside, `href` if it lies beside the page."""

    title: str
    alt: str
    caption: str
    uri: str | None = None
    href: str | None = None
    reason: str | None = None


class Album:
    """Takes pictures into one page while there is room; says where the others are."""

    def __init__(self, folder: Path, budget_bytes: int = PICTURE_BUDGET_BYTES) -> None:
        self._folder = folder
        self._left_bytes = budget_bytes
        self._cases_left = _MOST_CASES

    def panel(self, panel: Panel) -> Shown:
        """Return a picture of the report, or why it is not there."""
        if isinstance(panel, Absent):
            return Shown(panel.title, panel.title, "", reason=panel.reason)
        return self._shown(panel.path, panel.title, panel.alt, panel.caption, True)

    def case(self, case: dict[str, Any], run_dir: Path) -> Shown:
        """Return a case of the record of the run in `run_dir`: inside, or a link beyond 8."""
        name, caption = str(case.get("id")), str(case.get("caption") or "")
        path = run_dir / str(case.get("picture"))
        if not path.resolve().is_relative_to(run_dir.resolve()) or not path.is_file():
            return Shown(name, name, caption, reason=f"{case.get('picture')} is not there any more")
        shown = self._shown(path, name, f"Picture of {name}", caption, self._cases_left > 0)
        if shown.uri is not None:
            self._cases_left -= 1
        return shown

    def _shown(self, path: Path, title: str, alt: str, caption: str, wanted: bool) -> Shown:
        n_bytes = path.stat().st_size
        href = link(path, self._folder)
        if not wanted or n_bytes > self._left_bytes:
            return Shown(title, alt, caption, href=href)
        self._left_bytes -= n_bytes
        uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        return Shown(title, alt, caption, uri, href)


def link(path: Path, folder: Path) -> str:
    """Return the address of `path` from a page in `folder`."""
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill the template `template` with `values`, everything escaped; write it to `path`."""
    write_text(path, _environment().get_template(template).render(**values))
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("umtrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figures"] = _figures
    return environment


def _figures(text: str) -> Markup:
    """Return `text`, escaped, with its intervals held together where a line breaks."""
    return Markup(_INTERVAL.sub(r'<span class="n">\g<0></span>', str(escape(text))))
