"""Take screenshots of every page of the dashboard, in light and dark; the README shows one of them.

    python docs/screenshots.py --runs runs --out docs/images

Needs chromium (`make browser`) and a runs folder (`make demo HEADLESS=1`).
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PAGES = {
    "runs": 1500,
    "alignment": 1150,
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
}  # height of the screenshot
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main() -> None:
    """Serve the dashboard, visit every page in both themes, and save a PNG of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--query", default="", help="query string, such as models=a&models=b")
    options = parser.parse_args()
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
        str(options.runs),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            for theme in ("light", "dark"):
                page = browser.new_page(color_scheme=theme, device_scale_factor=1)
                for name, height in PAGES.items():
                    page.set_viewport_size({"width": 1400, "height": height})
                    page.goto(f"http://127.0.0.1:{port}/{name.removeprefix('runs')}?{options.query}")
                    _settle(page)
                    page.screenshot(path=options.out / f"{name}-{theme}.png")
            browser.close()
    finally:
        server.terminate()


def _settle(page: Page) -> None:
    """Wait until the page has drawn and stopped running."""
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
