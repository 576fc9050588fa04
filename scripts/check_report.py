"""Look at a report in headless Chromium: four screenshots, and a failure where a reader would stumble.

    python scripts/check_report.py run/report.html --out pictures

Shows the page at 1280 and 375 pixels, light and dark, and fails (exit code 1) on console messages, on anything that
the page loads, on horizontal overflow of the page, on text below 10 pixels and on labels of a figure that overlap.
Chromium is driven through its own pipe (``--remote-debugging-pipe``): nothing is installed, no port is opened.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

VIEWS = [(width, scheme) for width in (1280, 375) for scheme in ("light", "dark")]
SMALLEST_TEXT = 10.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--no-first-run",
)

MEASURE = """
(() => {
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || !parent.getClientRects().length || parent.closest("style")) continue;
    const svg = parent.closest("svg"), size = parseFloat(getComputedStyle(parent).fontSize);
    const scale = svg && svg.viewBox.baseVal ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push([size * scale, node.data.trim().slice(0, 40)]);
  }
  const overlaps = [];
  for (const svg of document.querySelectorAll("svg")) {
    const labels = [...svg.querySelectorAll("text")].map(t => [t.getBoundingClientRect(), t.textContent.trim()]);
    labels.forEach(([a, one], i) => labels.slice(i + 1).forEach(([b, other]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 3) overlaps.push(one + " / " + other);
    }));
  }
  const images = [...document.images].filter(i => !i.alt).length;
  const broken = [...document.images].filter(i => !i.naturalWidth).length;
  texts.sort((a, b) => a[0] - b[0]);
  return JSON.stringify({wide, smallest: texts[0] || null, overlaps, images, broken,
                         height: document.documentElement.scrollHeight});
})()
"""


class Browser:
    """A headless Chromium that is spoken to through its debugging pipe; messages end with a zero byte."""

    def __init__(self, program: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._count, self._rest = 0, b""
        self._profile = tempfile.TemporaryDirectory(prefix="check-report-", ignore_cleanup_errors=True)
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()
        self._in, self._out = here_in, here_out
        shell = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, str(there_in), str(there_out), *command],
            pass_fds=(there_in, there_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there_in)
        os.close(there_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; events that come in between are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        session = getattr(self, "_session", None)
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Until an event of that name has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


def look(browser: Browser, page: Path, width: int, scheme: str, picture: Path) -> list[str]:
    """One view: the screenshot, and what is wrong with it."""
    browser.events.clear()
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.call(f"{domain}.enable")
    size = {"width": width, "height": 800, "deviceScaleFactor": 1 if width > 600 else 2}
    browser.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Page.navigate", url=page.resolve().as_uri())
    browser.wait_for("Page.loadEventFired")
    found = json.loads(browser.call("Runtime.evaluate", expression=MEASURE)["result"]["value"])
    shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    picture.write_bytes(base64.b64decode(shot["data"]))
    return said(browser.events, page) + wrong(found)


def said(events: list[dict[str, Any]], page: Path) -> list[str]:
    """Console messages, exceptions, and everything that was loaded besides the page."""
    problems = []
    for event in events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded":
            problems.append(f"console: {params['entry'].get('text')}")
        if method == "Runtime.consoleAPICalled":
            problems.append(f"console: {params['type']} {[a.get('value') for a in params['args']]}")
        if method == "Runtime.exceptionThrown":
            problems.append(f"exception: {params['exceptionDetails'].get('text')}")
        if method == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if not address.startswith("data:") and address != page.resolve().as_uri():
                problems.append(f"loads {address}")
    return problems


def wrong(found: dict[str, Any]) -> list[str]:
    """What the measurements of a page say against it."""
    problems = []
    if found["wide"] > 0:
        problems.append(f"the page is {found['wide']} pixels wider than the window")
    if found["smallest"] and found["smallest"][0] < SMALLEST_TEXT:
        problems.append(f"text of {found['smallest'][0]:.1f} pixels: '{found['smallest'][1]}'")
    problems += [f"labels overlap: {pair}" for pair in found["overlaps"]]
    if found["images"]:
        problems.append(f"{found['images']} pictures have no alternative text")
    if found["broken"]:
        problems.append(f"{found['broken']} pictures cannot be shown")
    return problems


def main() -> int:
    """Check one page; 0 if nothing is wrong, 1 if something is, 2 if it cannot be looked at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="folder of the screenshots; default: beside the page")
    arguments = parser.parse_args()
    program = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if program is None or not arguments.page.is_file():
        print("There is no Chromium" if program is None else f"There is no page '{arguments.page}'", file=sys.stderr)
        return 2
    out = arguments.out or arguments.page.parent
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    with Browser(program) as browser:
        for width, scheme in VIEWS:
            picture = out / f"{arguments.page.stem}-{width}-{scheme}.png"
            problems = look(browser, arguments.page, width, scheme, picture)
            failed |= bool(problems)
            print(f"{picture}: {'; '.join(dict.fromkeys(problems)) or 'good'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
