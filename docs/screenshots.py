"""Take screenshots of the dashboard's pages; the README shows `home-desktop-light.png`.

    python docs/screenshots.py --runs runs --out docs/images --pages home --themes light --widths desktop --first

Needs chromium (`make browser`) and a folder with finished runs (`make demo HEADLESS=1`).
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PAGES = {"home": "", "models": "models", "layers": "layers", "examples": "examples", "explorer": "explorer"}
PAGES |= {f"evidence-{part}": f"evidence?part={part}" for part in ("claims", "runs", "new", "report")}
WIDTHS = {"desktop": 1440, "phone": 390}  # in pixels
HEIGHT = 900  # of the first screen
TALLEST = 8000
CHROMIUM_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main() -> None:
    """Serve the dashboard, visit the pages, and save a PNG of each in each theme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of runs that is shown")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder for the PNG files")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES), help="all pages by default")
    parser.add_argument("--themes", nargs="+", choices=("light", "dark"), default=["light", "dark"])
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="both by default")
    parser.add_argument("--query", default="", help="query string of every page, such as b=baseline&m=viral")
    parser.add_argument("--first", action="store_true", help="the first screen alone, not the whole page")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with dashboard(options.runs) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        for theme in options.themes:
            for width in options.widths:
                page = browser.new_page(color_scheme=theme, device_scale_factor=1)
                for name in options.pages:
                    path, _, query = PAGES[name].partition("?")
                    page.set_viewport_size({"width": WIDTHS[width], "height": HEIGHT})
                    page.goto(f"{address}/{path}?{'&'.join(filter(None, (query, options.query)))}")
                    _wait_until_drawn(page)
                    if not options.first:
                        _fit(page, WIDTHS[width])
                    page.screenshot(path=options.out / f"{name}-{width}-{theme}.png")
                page.close()
        browser.close()


def _fit(page: Page, width: int) -> None:
    """Make the window as high as the page, which scrolls inside itself."""
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": width, "height": min(TALLEST, max(HEIGHT, int(height) + 80))})
    _wait_until_drawn(page)


@contextmanager
def dashboard(runs: Path) -> Iterator[str]:
    """Serve the dashboard of a runs folder and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        "app.py",
        "--server.port",
        str(port),
        "--",
        "--runs",
        str(runs),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()


def _wait_until_drawn(page: Page) -> None:
    """Wait until the page has drawn everything and its script no longer runs."""
    page.wait_for_selector("h1", timeout=60_000)
    idle = (
        "() => document.querySelector('[data-test-script-state=notRunning]') &&"
        " !document.querySelector('[data-testid=stSkeleton]')"
    )
    for _ in range(3):  # a widget's first value can start a second run
        page.wait_for_function(idle, timeout=120_000)
        page.wait_for_timeout(700)


if __name__ == "__main__":
    main()
