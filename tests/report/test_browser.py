"""The pages in a real browser: on a phone and a desk, dark, printed; with no network at all."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from umtrain.cli import main

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe"),
)
PATIENCE_S = 60
PARTS = {
    "run": ("verdict", "pictures", "figures", "cases", "data", "memory", "missing", "provenance"),
    "sweep": ("verdict", "pictures", "jobs", "missing", "provenance"),
    "comparison": (*("verdict", "pictures", "figures", "cases", "cost", "images", "provenance"),),
}
PAGES = tuple(PARTS)
PHONE, DESK = 320, 1280
DARK = [{"name": "prefers-color-scheme", "value": "dark"}]
# Elements that reach past the window, but for those inside something that scrolls by itself.
OVERFLOWING = """
[...document.body.querySelectorAll('*')].filter(element => {
  const scrolls = element.closest('.scroll, .wide, pre');
  return element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
    && (!scrolls || scrolls === element);
}).map(element => element.outerHTML.slice(0, 200))
"""


class Browser:
    """Headless Chromium with one tab, over the DevTools protocol on a pair of pipes."""

    def __init__(self, program, profile):
        read_ours, write_theirs = os.pipe()
        read_theirs, write_ours = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        wire = f'exec "$0" "$@" 3<&{read_theirs} 4>&{write_theirs}'
        self._process = subprocess.Popen(
            ["bash", "-c", wire, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._in, self._out = os.fdopen(read_ours, "rb"), os.fdopen(write_ours, "wb")
        self._number, self._session = 0, None
        self.events = []
        os.set_blocking(self._in.fileno(), False)
        self._held = b""
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Call a method of the protocol; return its result, events kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, path, width=DESK, media="screen", features=()):
        """Load a file at a window's width; forget the events of earlier pages."""
        self.events.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", media=media, features=list(features))
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def value(self, expression):
        """Return what a JavaScript expression is on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path):
        """Write the whole page, as it looks, to `path`."""
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        """End the browser and its helpers."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._in.close()
        self._out.close()

    def _message(self):
        give_up_s = time.monotonic() + PATIENCE_S
        while b"\0" not in self._held:
            left_s = max(0.0, give_up_s - time.monotonic())
            assert select.select([self._in], [], [], left_s)[0], "the browser does not answer"
            part = self._in.read()
            assert part, "the browser has ended"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    """The pages of a run, a sweep and a comparison, by name, and one of radiographs."""
    folder = tmp_path_factory.mktemp("pages")
    one = runs.slides(folder / "a run, 50% & more", n_cases=10)
    other = runs.slides(folder / ("a-very-long-name-of-a-run-" * 6), seed=4)
    swept = runs.sweep(folder / "sweep")
    both = folder / "both"
    assert main(["report", str(one)]) == 0
    assert main(["report", str(swept)]) == 0
    assert main(["report", str(one), str(other), f"out={both}"]) == 0
    written = {"run": one, "sweep": swept, "comparison": both}
    return {name: path / "report.html" for name, path in written.items()}


@pytest.fixture(params=PAGES)
def page(request, pages):
    return request.param, pages[request.param]


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("features", [[], DARK], ids=["light", "dark"])
def test_nothing_overflows_and_nothing_is_fetched(browser, page, width, features):
    name, path = page
    browser.open(path, width, features=features)
    for part in PARTS[name]:
        assert browser.value(f"document.getElementById('{part}').offsetHeight > 0"), part
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOWING) == []
    assert _requests(browser) == {path.resolve().as_uri()}
    assert _complaints(browser) == []


def test_every_picture_is_there_with_words_for_those_who_cannot_see_it(browser, page):
    browser.open(page[1])
    bad = "[...document.images].filter(image => !image.naturalWidth || !image.alt).length"
    assert browser.value("document.images.length") > 0
    assert browser.value(bad) == 0


def test_headings_are_nested_and_the_contents_lead_to_them(browser, page):
    browser.open(page[1])
    levels = browser.value("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    links = browser.value("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert len(links) > 3
    assert all(browser.value(f"!!document.getElementById('{link}')") for link in links)


def test_dark_pages_keep_pictures_as_they_are_on_a_light_card(browser, page):
    browser.open(page[1], features=DARK)
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    card = "getComputedStyle(document.querySelector('.light'))"
    assert browser.value(f"{card}.backgroundColor") == "rgb(255, 255, 255)"
    filters = "[...document.images].map(image => getComputedStyle(image).filter)"
    assert set(browser.value(filters)) == {"none"}


def test_text_stands_out_from_its_ground(browser, page):
    for features in ([], DARK):
        browser.open(page[1], features=features)
        assert min(browser.value(CONTRASTS)) >= 4.5


def test_paper_is_light_and_shows_what_a_screen_folds(browser, pages):
    browser.open(pages["run"], width=800, media="print", features=DARK)
    assert browser.value("getComputedStyle(document.body).color") == "rgb(26, 34, 44)"
    folded = "[...document.querySelectorAll('details > *:not(summary)')]"
    assert browser.value(f"{folded}.length") > 0
    assert browser.value(f"{folded}.every(part => part.getBoundingClientRect().height > 0)")
    assert browser.value("document.documentElement.scrollWidth") <= 800
    printed = browser.call("Page.printToPDF", printBackground=False)
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def test_links_beside_the_page_lead_to_files_that_are_there(browser, pages):
    for path in pages.values():
        browser.open(path)
        found = browser.value("[...document.querySelectorAll('main a[href]')].map(a => a.href)")
        here = [url for url in found if "#" not in url]
        assert here
        for url in here:
            reached = browser.value(f"decodeURIComponent(new URL({json.dumps(url)}).pathname)")
            assert Path(reached).exists(), url


# WCAG's contrast of each text with the ground behind it.
CONTRASTS = """
(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('p, td, th, caption, figcaption, a, summary, h1, h2, h3')]
    .filter(element => element.innerText && element.offsetHeight)
    .map(element => {
      const pair = [getComputedStyle(element).color, null].map((colour, i) =>
        luminance(i ? ground(element) : channels(colour)));
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    });
})()
"""


def _requests(browser):
    sent = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    return {
        event["params"]["request"]["url"]
        for event in sent
        if not event["params"]["request"]["url"].startswith("data:")
    }


def _complaints(browser):
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [event["params"] for event in browser.events if event["method"] in kinds]
