"""Take screenshots of the dashboard's pages; the README shows `alignment-light.png`.

    python docs/screenshots.py --runs runs --out docs/images --pages alignment --themes light

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

WIDTH = 1400  # of every screenshot, in pixels
HEIGHTS = {
    "runs": 1500,
    "alignment": 830,
    "permutation": 1700,
    "attention": 1400,
    "knockout": 1500,
    "patching": 1300,
    "tokens": 1500,
    "logit-lens": 1700,
    "linear-probe": 1700,
    "dynamics": 2400,
    "claims": 1700,
    "scene": 1250,
}
CHROMIUM_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main() -> None:
    """Serve the dashboard, visit the pages, and save a PNG of each in each theme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of runs that is shown")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="the folder for the PNG files")
    parser.add_argument("--pages", nargs="+", choices=HEIGHTS, default=list(HEIGHTS), help="all pages by default")
    parser.add_argument("--themes", nargs="+", choices=("light", "dark"), default=["light", "dark"])
    parser.add_argument("--query", default="", help="query string of every page, such as models=a&models=b")
    options = parser.parse_args()
    with dashboard(options.runs) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        for theme in options.themes:
            page = browser.new_page(color_scheme=theme, device_scale_factor=1)
            for name in options.pages:
                page.set_viewport_size({"width": WIDTH, "height": HEIGHTS[name]})
                page.goto(f"{address}/{name.removeprefix('runs')}?{options.query}")
                _wait_until_drawn(page)
                page.screenshot(path=options.out / f"{name}-{theme}.png")
        browser.close()


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
