"""Figures as SVG, PNG and PDF, by a browser of this machine without a window, without a network and without a hub.

The browser is spoken to through two pipes (Chromium's `--remote-debugging-pipe`: JSON messages that end with a zero
byte), so that no port is opened. plotly's own code draws the figure, and the browser prints the PDF and embeds
the fonts in it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from workbench.errors import RunError
from workbench.figures.template import javascript

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge")
APPS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
PATIENCE = 60.0  # seconds for one answer
PIXELS = 96  # of an inch in a browser
DPI = 300  # of a PNG


def browser_file() -> str | None:
    """Return where a Chromium, Chrome or Edge is: what BROWSER_PATH names, else the first found; None without one."""
    named = os.environ.get("BROWSER_PATH", "")
    files = [named] if named else [*map(shutil.which, NAMES), *APPS]
    return next((file for file in files if file and os.access(file, os.X_OK)), None)


class Browser:
    """A browser that draws figures; use it in a `with` statement.

    Raises:
        RunError: there is no browser here, it does not start, or it does not answer.
    """

    def __init__(self) -> None:
        file = browser_file()
        if file is None:
            raise RunError(
                "no browser was found: expected Chromium or Chrome, such as from `apt install chromium`, or its file in"
                " the variable BROWSER_PATH"
            )
        self._profile = tempfile.TemporaryDirectory(prefix="viral-browser-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        words = [file, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        words += ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
        words += ["--disable-sync", "--disable-extensions"] + ["--no-sandbox"] * (os.geteuid() == 0) + ["about:blank"]
        # the browser reads from 3 and writes to 4
        shell = f'exec "$@" 3</dev/fd/{theirs_in} 4>/dev/fd/{theirs_out}'
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", shell, "sh", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
            )
        except OSError as error:
            self._profile.cleanup()
            raise RunError(f"{file} cannot be started: {error.strerror or error}") from error
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", ""

    def __enter__(self) -> Browser:
        try:
            pages = self._ask("Target.getTargets")["targetInfos"]
            page = next(each["targetId"] for each in pages if each["type"] == "page")
            self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            self._evaluate(f"{javascript()}; 0")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        for pipe in (self._out, self._in):
            os.close(pipe)
        try:
            self._process.wait(5)  # it ends when its pipe is closed
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def draw(self, figure: Mapping[str, Any], form: str) -> bytes:
        """Return a figure as a file.

        Args:
            figure: the figure as plotly's JSON, with its width and height in its layout.
            form: svg, png (300 dpi) or pdf (one page of the size of the figure).

        Raises:
            RunError: the browser cannot draw it.
        """
        width, height = (figure["layout"][side] for side in ("width", "height"))
        wanted = {"format": "png" if form == "png" else "svg", "width": width, "height": height}
        if form == "png":
            wanted["scale"] = DPI / PIXELS
        address: str = self._evaluate(f"Plotly.toImage({_script(figure)}, {json.dumps(wanted)})")
        if form == "png":
            return base64.b64decode(address.partition(",")[2])
        svg: str = self._evaluate(f"decodeURIComponent({json.dumps(address.partition(',')[2])})")
        if form == "svg":
            return svg.encode()
        page = f"<style>@page{{margin:0}}html,body{{margin:0}}svg{{display:block}}</style>{svg}"
        self._evaluate(f"document.documentElement.innerHTML = {json.dumps(page)}; 0")
        inches = {"paperWidth": width / PIXELS, "paperHeight": height / PIXELS}
        margins = dict.fromkeys(("marginTop", "marginBottom", "marginLeft", "marginRight"), 0)
        printed = self._ask("Page.printToPDF", printBackground=True, pageRanges="1", **inches, **margins)
        return base64.b64decode(printed["data"])

    def _evaluate(self, code: str) -> Any:
        """Return the value of an expression of JavaScript, or what its promise becomes."""
        answer = self._ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            said = details.get("exception", {}).get("description") or details.get("text", "")
            raise RunError(f"the browser cannot draw the figure: {said[:200]}")
        return answer["result"].get("value")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        until = time.monotonic() + PATIENCE
        try:
            self._send(json.dumps(message).encode() + b"\0")
            while True:
                answer = json.loads(self._receive(until))
                if answer.get("id") == self._number:
                    break
        except OSError as error:
            raise RunError(f"the browser ended before it answered ({error.strerror or error})") from error
        if "error" in answer:
            raise RunError(f"the browser refuses {method}: {answer['error'].get('message', '')}")
        result: dict[str, Any] = answer["result"]
        return result

    def _send(self, message: bytes) -> None:
        while message:
            message = message[os.write(self._out, message) :]

    def _receive(self, until: float) -> bytes:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise RunError(f"the browser did not answer within {PATIENCE:.0f} s")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise BrokenPipeError(None, "its pipe is closed")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return message


def _script(figure: Mapping[str, Any]) -> str:
    """Return a figure as a JavaScript expression."""
    return json.dumps(figure).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
