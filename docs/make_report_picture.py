"""Take a picture of a report in a real browser, and check the page while it is open.

python docs/make_report_picture.py runs/tuned/report.html --out docs/pictures/report-desktop.png
python docs/make_report_picture.py runs/tuned/report.html --out phone.png --width 390 --dark --whole

It needs `chromium` (apt-get install chromium fonts-inter) and nothing else: the browser is spoken to through a pair of
pipes (--remote-debugging-pipe). It fails when the page asks for anything from outside, writes an error to the console,
or is wider than the window.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
WIDEST = """
JSON.stringify({page: document.documentElement.scrollWidth, window: window.innerWidth,
  height: document.documentElement.scrollHeight, charts: document.querySelectorAll(".plot .main-svg").length,
  wide: [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 &&
    !e.closest(".scroll, pre, .skip, .plot")).slice(0, 5).map(e => e.outerHTML.slice(0, 120))})
"""


class Browser:
    """Chromium, spoken to in the DevTools protocol: JSON messages that end with a zero byte."""

    def __init__(self, program: str, profile: str) -> None:
        read_theirs, write_ours = os.pipe()
        read_ours, write_theirs = os.pipe()
        command = f'exec "$0" "$@" 3<&{read_theirs} 4>&{write_theirs}'
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", command, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_theirs, write_theirs), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_theirs)
        os.close(write_theirs)
        self._write, self._read = os.fdopen(write_ours, "wb"), os.fdopen(read_ours, "rb")
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and wait for its answer; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def wait_for(self, event: str) -> None:
        """Wait until an event has come."""
        while not any(each.get("method") == event for each in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        self.call("Browser.close")
        self.process.wait(timeout=20)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read.fileno(), 1 << 20)
            if not part:
                raise RuntimeError("The browser has gone; does it start at all? Try: chromium --version")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self.events.append(message)
        return message


def open_page(browser: Browser, file: Path, width: int, height: int, is_dark: bool) -> dict[str, Any]:
    """Open a file as a window of that size sees it, and measure the page."""
    for domain in ("Page", "Runtime", "Network", "Log"):
        browser.call(f"{domain}.enable")
    is_phone = width < 600
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
    browser.call("Emulation.setEmulatedMedia", features=scheme)
    browser.call("Page.navigate", url=file.resolve().as_uri())
    browser.wait_for("Page.loadEventFired")
    browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 300)))")
    measured: dict[str, Any] = json.loads(browser.evaluate(WIDEST))
    return measured


def complaints(browser: Browser, measured: dict[str, Any], file: Path) -> list[str]:
    """Return what is wrong with the open page."""
    wrong = []
    for event in browser.events:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if url != file.resolve().as_uri() and not url.startswith("data:"):
                    wrong.append(f"it asks for {url}")
            case "Runtime.exceptionThrown":
                wrong.append(f"exception: {parameters['exceptionDetails']}")
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                wrong.append(f"console: {parameters['args']}")
            case "Log.entryAdded":
                wrong.append(f"log: {parameters['entry']['text']}")
            case _:
                pass
    if measured["page"] > measured["window"]:
        wrong.append(f"it is {measured['page']} wide in a window of {measured['window']}: {measured['wide']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1500, help="so much of the page from its top")
    parser.add_argument("--top", type=int, default=0, help="begin so far down")
    parser.add_argument("--whole", action="store_true", help="the page to its end")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--run", default="", help="JavaScript to run before the picture is taken")
    parser.add_argument("--browser", default="chromium")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(asked.browser, profile)
        try:
            measured = open_page(browser, asked.report, asked.width, 900, asked.dark)
            if asked.run:
                browser.evaluate(asked.run)
            height = measured["height"] - asked.top if asked.whole else asked.height
            clip = {"x": 0, "y": asked.top, "width": asked.width, "height": height, "scale": 1}
            picture = browser.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
            wrong = complaints(browser, measured, asked.report)
        finally:
            browser.close()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_bytes(base64.b64decode(picture["data"]))
    size = f"{asked.width} x {height} of {measured['height']} pixels, {asked.out.stat().st_size} bytes"
    print(f"{asked.out}: {size}, {measured['charts']} drawings")
    for each in wrong:
        print(f"  {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
