"""The report of a choice of models: the numbers of the pages, the summary first, small, and safe."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT, refused, run
from tests.workbench.dashboard.test_dashboard import CHROMIUM, chromium_or_skip
from tests.workbench.overview.folders import cknna, knockout, lens, train
from workbench import figures
from workbench.overview.differences import pairs_of
from workbench.overview.models import read_models
from workbench.overview.report import selection_report
from workbench.overview.stored import read_stored
from workbench.overview.story import tell

EVIL = "<img src=x onerror=alert(1)>"


def page_of(root: Path, second: str) -> str:
    stored = read_stored(root)
    models = read_models(root, stored.runs)
    (pair,) = pairs_of(models, "baseline", [second])
    link = f"http://localhost/?b=baseline&m={second}"
    return selection_report(root, stored, models, pair, ["baseline", second], {}, link)


@pytest.fixture(params=["viral", EVIL])
def two(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    train(tmp_path, "baseline", right=[i % 2 == 0 for i in range(40)])
    train(tmp_path, request.param, right=[i % 10 > 0 for i in range(40)], aligned=True, layer=[1])
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    for name, shift in (("baseline", 0.0), (request.param, 0.1)):
        cknna(tmp_path, name, {layer: 0.5 + shift * layer + noise for layer in range(3)})
    return tmp_path, request.param


def test_the_summary_comes_first_with_the_numbers_of_the_pages(two: tuple[Path, str]) -> None:
    page = page_of(*two)
    text = unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)))
    stored = read_stored(two[0])
    (pair,) = pairs_of(read_models(two[0], stored.runs), "baseline", [two[1]])
    story = tell(pair, stored)
    for card in story.cards:
        assert card.value in text
        assert card.change in text
    order = [page.index(mark) for mark in ('class="cards"', 'id="accuracy"', 'id="layers"', 'id="runs"')]
    assert order == sorted(order)
    for name in two[0].glob("*/accuracy.parquet"):
        row = pd.read_parquet(name).set_index("category").loc["mean of types"]
        assert f"{row['accuracy']:.3f}" in text
    assert "python" in text
    csv = re.search(r'download="differences.csv" href="data:text/csv;base64,([^"]+)"', page)
    assert csv is not None
    assert "CKNNA with dinov2-small" in base64.b64decode(csv[1]).decode()


def test_it_says_what_is_drawn_and_what_is_left_out_as_the_page_does(tmp_path: Path) -> None:
    keys = ["baseline", *(f"viral{number}" for number in range(figures.LINES))]
    for number, key in enumerate(keys):
        more = {"layer": [number]} if number else {}
        train(tmp_path, key, right=[True] * 40, aligned=number > 0, **more)
        cknna(tmp_path, key, {1: np.full(20, 0.5)})
    for file in tmp_path.glob("cknna-*/run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"left_out": ["7 images were left out"]}))
    stored = read_stored(tmp_path)
    models = read_models(tmp_path, stored.runs)
    (pair,) = pairs_of(models, "baseline", ["viral0"])
    page = selection_report(tmp_path, stored, models, pair, keys, {})
    assert "Left out: 7 images were left out" in page and "95 % intervals; dotted: " not in page  # a map has no line
    assert "Each model by question type" in page
    damaged = next(run.folder for run in stored.runs if run.model == keys[-1])
    (damaged / "scores.parquet").unlink()
    stored = read_stored(tmp_path)
    page = selection_report(tmp_path, stored, models, pair, keys[:2], {})
    assert f"{damaged.name}: scores.parquet is missing or damaged" in page
    assert "95 % intervals; dotted: chance (95th percentile). Left out: 7 images were left out" in page


def test_it_names_what_cannot_be_used_as_the_pages_do(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("baseline", "viral"):
        train(root, name, right=[True] * 40, aligned=name == "viral")
        cknna(root, name, {1: np.full(20, 0.5)})
    train(root, "anew", right=[True] * 40, created="2026-03-01T00:00:00+00:00")
    stale = cknna(root, "anew", {1: np.full(20, 0.5)}, created="2026-02-01T00:00:00+00:00")
    (root / "viral").rename(tmp_path / "viral")
    (root / "viral").symlink_to(tmp_path / "viral")
    page = page_of(root, "viral")
    assert "viral: is a link, which is not followed: expected the folder or file itself" in page
    assert "How viral was trained is not known here: its record or recipe cannot be read." in page
    assert "cannot be compared (viral: is a link, which is not followed" in page
    assert "<td>1500</td>" in page  # steps, also beside a model of which they are not known
    assert f"{stale.name}: anew was trained anew after it" in page


def test_a_measure_that_no_run_has_is_left_out(tmp_path: Path) -> None:
    """As that of single blocks where windows were knocked out."""
    for name in ("baseline", "viral"):
        train(tmp_path, name, right=[True] * 40, aligned=name == "viral")
        knockout(tmp_path, name, [(0, 2), (1, 3)], width=3)
    assert "<p>No measure of their layers is stored.</p>" in page_of(tmp_path, "viral")
    for name in ("baseline", "viral"):
        lens(tmp_path, name, ["class"])
    page = page_of(tmp_path, "viral")
    assert "<h4>logit lens: class comes first</h4>" in page
    assert len(re.findall("<h4>", page)) == len(re.findall("<h3>(?:Readable|Used)", page)) == 1


def test_it_is_small_printable_and_without_markup_of_names(two: tuple[Path, str]) -> None:
    page = page_of(*two)
    assert len(page.encode()) < 3_000_000
    assert "@media print" in page
    assert "<img src=x" not in page
    assert "default-src 'none'" in page
    assert page.count('<p class="quiet number">') == page.count('class="plotly-graph-div"') > 2


def test_it_needs_no_torch() -> None:
    code = "import sys, workbench.overview.report; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.browser
def test_every_figure_is_drawn_in_a_browser_without_a_network(two: tuple[Path, str], tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "report.html"
    file.write_text(page_of(*two))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_or_skip(), args=CHROMIUM)
        context = browser.new_context(offline=True, viewport={"width": 390, "height": 800})
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"file://{file}")
        page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
        assert page.locator(".js-plotly-plot").count() == page.locator(".plotly-graph-div").count() >= 4
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert not errors


def test_the_command_writes_the_same_report(two: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root, second = two
    out = tmp_path_factory.mktemp("out") / "report.html"

    def told(page: str) -> str:
        return page[page.index('class="cards"') : page.index('id="layers"')]

    done = run("workbench.overview", str(root), "--out", str(out))
    assert done.stdout.startswith(f"{out}: {second} against baseline, 2 models, ")
    assert told(out.read_text()) == told(page_of(root, second))
    run("workbench.overview", str(root), "--baseline", second, "--models", "baseline", "--out", str(out))
    assert told(out.read_text()) != told(page_of(root, second))
    before = out.read_bytes()
    said = refused("workbench.overview", str(root), "--baseline", "baselin", "--models", second, "--out", str(out))
    assert "model or variant 'baselin'" in said and "did you mean 'baseline'?" in said
    assert said.count("baseline") == 2  # listed once, although the variant has the same name
    assert "expected both or neither" in refused("workbench.overview", str(root), "--models", second, "--out", str(out))
    assert "expected a folder of runs" in refused("workbench.overview", str(root / "nope"), "--out", str(out))
    assert out.read_bytes() == before
