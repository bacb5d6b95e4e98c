"""Every page by Streamlit's own test harness, and the whole thing once in a real browser."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.conftest import ROOT
from workbench.cli import parse
from workbench.dashboard import folders, shell
from workbench.errors import RunError

PAGES = {"runs": "runs_page.page()", "claims": "claims_page.page()", "scene": "scene_page.page()"} | {
    name: f"analysis_page.page('{name}')" for name in shell.analysis_pages()
}


def open_page(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **query: str) -> AppTest:
    """Run one page on the runs folder `root`."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(root)])
    app = AppTest.from_string(
        f"from workbench.dashboard import {PAGES[name].split('.')[0]}\n{PAGES[name]}", default_timeout=120
    )
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, app.exception
    return app


@pytest.mark.parametrize("name", PAGES)
def test_every_page_says_what_to_do_when_nothing_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_page(name, tmp_path, monkeypatch)
    assert app.info
    assert "python -m" in app.info[0].value


def test_runs_page_lays_training_curves_over_each_other(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("runs", runs_folder, monkeypatch)
    assert app.multiselect(key="models").value == ["baseline", "viral"]
    table = app.dataframe[0].value
    assert table["model"].tolist() == ["baseline", "viral"]
    assert (table["state"] == "finished").all()
    assert (table["steps"] == 12).all()
    assert app.dataframe[1].value["label"].tolist() in (["baseline", "viral"], ["viral", "baseline"])
    (said,) = [caption.value for caption in app.caption if "tokens, k = " in caption.value]
    assert "viral, layer 2, efficientnet-lite0: n = 64 tokens, k = 10, 8 images" in said
    assert "baseline, layer 1, efficientnet-lite0" in said


def test_alignment_page_shows_interval_null_and_n(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("cknna", runs_folder, monkeypatch)
    app.select_slider(key="layer").set_value(3).run()
    table = app.dataframe[0].value
    assert table["model"].tolist() == app.multiselect(key="run").value or len(table) == 2
    assert (table["layer"] == 3).all()
    assert (table["low"] <= table["score"]).all()
    assert (table["score"] <= table["high"]).all()
    assert {"null_mean", "null_q95", "p", "n_images", "n", "k"} <= set(table.columns)
    assert any("analyses.cknna" in code.value for code in app.code)


@pytest.mark.slow
def test_the_form_of_an_analysis_is_its_command(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults add nothing; what is changed becomes a flag that the command line takes."""
    app = open_page("cknna", runs_folder, monkeypatch)
    models = f"--model {runs_folder}/baseline {runs_folder}/viral"
    assert app.code[-1].value == f"python -m analyses.cknna {models} --output_dir {runs_folder}"
    app.number_input(key="new-k").set_value(7)
    app.selectbox(key="new-pooling").set_value("pooled")
    app.text_input(key="new-layers").set_value("0 2").run()
    command = app.code[-1].value
    assert (
        command == f"python -m analyses.cknna {models} --layers 0 2 --k 7 --pooling pooled --output_dir {runs_folder}"
    )
    analysis = importlib.import_module("analyses.cknna").ANALYSIS
    assert parse(analysis.config, ["--layers", "0", "2", "--k", "7", "--pooling", "pooled"], prog="test").k == 7


@pytest.mark.slow
def test_pages_are_found_without_importing_the_analyses() -> None:
    code = (
        "import sys; from workbench.dashboard import shell; print(shell.analysis_pages()); assert 'torch' not in"
        " sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'cknna': 'Alignment'" in done.stdout
    for name, title in shell.analysis_pages().items():
        assert importlib.import_module(f"analyses.{name}").ANALYSIS.heading == title


@pytest.mark.slow
def test_scene_page_answers_and_maps(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("scene", runs_folder, monkeypatch)
    assert [m.label for m in app.metric] == ["baseline", "viral"]
    app.slider(key="layer").set_value(1).run()
    assert not app.exception
    before = [m.value for m in app.metric]
    app.number_input(key="scene").set_value(5).run()
    assert not app.exception
    assert len(app.metric) == len(before) == 2


def test_paths_outside_the_runs_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    (tmp_path / "link").symlink_to("/etc")
    for path in ("../secret", "/etc/passwd", "link/passwd"):
        with pytest.raises(RunError, match="is not below the runs folder"):
            folders.below_root(path)
    assert folders.below_root("a/b") == tmp_path / "a" / "b"


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """The dashboard as a user starts it."""
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
        str(root),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline, "the dashboard did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def test_the_dashboard_is_for_this_machine_and_watches_no_files() -> None:
    """A watcher of files can hang the server when a page is closed, so that no page answers any more."""
    server = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["server"]
    assert server["address"] == "127.0.0.1"
    assert server["fileWatcherType"] == "none"


@pytest.fixture
def served(runs_folder: Path) -> Iterator[str]:
    with serve(runs_folder) as address:
        yield address


def chromium_or_skip() -> str:
    """Where chromium is; without it a test is skipped, but not in CI."""
    found = shutil.which("chromium")
    if found is None:
        assert not os.environ.get("CI"), "chromium is not installed: run make browser"
        pytest.skip("chromium is not installed: run make browser")
    return found


CHROMIUM = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.mark.browser
def test_in_a_real_browser(served: str) -> None:
    """Open the alignment page from the navigation, move the layer, read the row, and find both in the address."""
    from playwright.sync_api import expect, sync_playwright

    chromium = chromium_or_skip()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(served)
        expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible(timeout=30_000)
        page.get_by_role("link", name="Alignment").click()
        expect(page.get_by_role("heading", name="Alignment", exact=True)).to_be_visible(timeout=60_000)
        expect(page.locator(".js-plotly-plot").first).to_be_visible(timeout=60_000)
        slider = page.get_by_role("slider")
        slider.focus()
        before = slider.get_attribute("aria-valuetext")
        slider.press("ArrowRight")
        page.wait_for_url(re.compile("layer="), timeout=30_000)
        after = slider.get_attribute("aria-valuetext")
        assert after != before
        assert f"layer={after}" in page.url
        expect(page.get_by_text("chance (null mean to 95 %)")).to_be_visible()
        assert page.locator("[data-testid=stAlert]").count() == 0
        assert not errors
        browser.close()
