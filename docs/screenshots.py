"""Take screenshots of the dashboard's pages; the README shows `home-desktop-light.png`.

    python docs/screenshots.py --runs runs --out /tmp/pages
    python docs/screenshots.py --runs runs --scenes stored --pages home --themes light --widths desktop --first

Every page is drawn at both widths and in both themes, and in five scenes: the folder as it is (stored), with twelve
models whose numbers are those of its two (many), with none (empty), while the demo trains (running), and with damaged
files (damaged). Needs chromium (`make browser`) and a folder with finished runs (`make demo HEADLESS=1`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

PAGES = {"home": "", "models": "models", "layers": "layers", "examples": "examples", "explorer": "explorer"}
PAGES |= {"model": "models?one=viral"}
PAGES |= {f"explorer-{view}": f"explorer?view={view}" for view in ("maps", "umap", "attention", "words")}
PAGES |= {f"evidence-{part}": f"evidence?part={part}" for part in ("claims", "runs", "new", "report")}
SCENES = ("stored", "many", "empty", "running", "damaged")
FIRST, SECOND = "baseline", "viral"  # the models of the demo
WEIGHTS = ("*.pt", "*.pth", "model*.safetensors", "alignment_head.safetensors", "report.html", "sweep-*.html")
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
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES), help="all scenes by default")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES), help="all pages by default")
    parser.add_argument("--themes", nargs="+", choices=("light", "dark"), default=["light", "dark"])
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="both by default")
    parser.add_argument("--query", default="", help="query string of every page, such as b=baseline&m=viral")
    parser.add_argument("--first", action="store_true", help="the first screen alone, not the whole page")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        for scene in options.scenes:
            root = options.runs if scene == "stored" else staged(scene, options.runs, Path(folder) / scene)
            query = options.query
            if scene == "many":
                names = sorted(file.parent.name for file in root.glob("*/training.json"))
                query = query or "&".join([f"b={FIRST}", *(f"m={name}" for name in names if name != FIRST)])
            with dashboard(root) as address:
                _take(browser, address, options, scene, query)
        browser.close()


def _take(browser: Browser, address: str, options: argparse.Namespace, scene: str, chosen: str) -> None:
    prefix = "" if scene == "stored" else f"{scene}-"
    for theme in options.themes:
        for width in options.widths:
            page = browser.new_page(color_scheme=theme, device_scale_factor=1)
            for name in options.pages:
                path, _, query = PAGES[name].partition("?")
                page.set_viewport_size({"width": WIDTHS[width], "height": HEIGHT})
                page.goto(f"{address}/{path}?{'&'.join(filter(None, (query, chosen)))}")
                _wait_until_drawn(page)
                if not options.first:
                    _fit(page, WIDTHS[width])
                page.screenshot(path=options.out / f"{prefix}{name}-{width}-{theme}.png")
            page.close()


# --- scenes ---------------------------------------------------------------------------------------


def staged(scene: str, runs: Path, root: Path) -> Path:
    """Return a copy of a demo's runs folder, without weights, in the state of a scene."""
    if scene == "empty":
        root.mkdir()
        return root
    shutil.copytree(runs, root, ignore=shutil.ignore_patterns(*WEIGHTS))
    {"many": _many, "running": _running, "damaged": _damaged}[scene](root)
    return root


def _many(root: Path) -> None:
    """Add copies of the second model that were trained with other weights, as far as the pages know: twelve in all."""
    for number in range(10):
        _copy(root, SECOND, f"{SECOND}_w{0.1 * 2**number:g}", weight=0.1 * 2**number)


def _copy(root: Path, name: str, new: str, *, weight: float) -> None:
    """Copy a training and its stored analyses, with another weight in the recipe."""
    shutil.copytree(root / name, root / new)
    file = root / new / "training.json"
    record = json.loads(file.read_text())
    record["recipe"]["alignment"]["weight"] = weight
    file.write_text(json.dumps(record))
    (root / new / "recipe.yaml").write_text(yaml.safe_dump(record["recipe"]))
    for run in list(root.glob("*/run.json")):
        stored = json.loads(run.read_text())
        if stored.get("label") == name:
            folder = shutil.copytree(run.parent, root / f"{run.parent.name}-{new}")
            (folder / "run.json").write_text(json.dumps(stored | {"label": new, "model": new}))


def _running(root: Path) -> None:
    """Let the second model be halfway through its training, and the demo be running."""
    for name in ("training.json", "evaluation.parquet", "accuracy.parquet"):
        (root / SECOND / name).unlink()
    file = root / SECOND / "training.parquet"
    log = pd.read_parquet(file)
    log[log["step"] <= log["step"].max() / 2].to_parquet(file)
    for run in root.glob("*/run.json"):
        shutil.rmtree(run.parent)
    for sweep in root.glob("sweep-*"):
        sweep.unlink()
    progress = json.loads((root / "demo.json").read_text())
    for number, stage in enumerate(progress["stages"]):
        stage["state"] = ("done", "running")[number] if number < 2 else "waiting"
    (root / "demo.json").write_text(json.dumps(progress | {"process": os.getpid()}))


def _damaged(root: Path) -> None:
    """Cut a file of each kind, of copies of the second model and of its stored analyses."""
    for name in ("training.json", "training.parquet", "evaluation.parquet", "accuracy.parquet"):
        file = shutil.copytree(root / SECOND, root / f"cut-{Path(name).stem}-{Path(name).suffix[1:]}") / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    runs = sorted(root.glob("cknna-*")) + sorted(root.glob("attention-*"))
    for folder, name in ((runs[0], "run.json"), (runs[1], "scores.parquet"), (runs[-1], "tensors.safetensors")):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    (root / "sweep-cut.parquet").write_bytes(next(root.glob("sweep-*.parquet")).read_bytes()[:1000])


# --- pages ----------------------------------------------------------------------------------------


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
