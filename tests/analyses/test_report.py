"""The report of all analyses: from the real command line, self-contained, safe against strange names, and once in a
real browser without a network."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analyses.all.__main__ import command_of, ledger_of
from analyses.dynamics import ANALYSIS as DYNAMICS
from analyses.knockout import ANALYSIS as KNOCKOUT
from tests.conftest import refused, run
from tests.workbench.dashboard.test_dashboard import CHROMIUM
from tests.workbench.overview.folders import cknna
from workbench import figures as fig
from workbench import html_page, runs
from workbench.analysis import report
from workbench.analysis.api import compare
from workbench.analysis.declaration import Where
from workbench.analysis.discover import analysis_files
from workbench.cli import changed_flags, parse
from workbench.errors import RunError
from workbench.figures import new_figure
from workbench.runs import Run

EVIL = (
    "</script><script>document.title='taken'</script><img src=http://example.org/x.png"
    " onerror=\"document.title='taken'\">"
)


@pytest.fixture(scope="module")
def made(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a pair, one of which has no checkpoints."""
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(runs_folder / "baseline", root / "bare", ignore=shutil.ignore_patterns("checkpoint-*", "cknna-*"))
    models = [str(root / "bare"), str(runs_folder / "viral")]
    words = [
        "--only",
        "patching",
        "cknna",
        "dynamics",
        "--limit",
        "3",
        "--vfm",
        "efficientnet-lite0",
        "--output_dir",
        str(root / "runs"),
    ]
    done = run("analyses.all", "--model", *models, *words, "--report", str(root / "report.html"))
    assert "dynamics         viral; Left out: bare." in done.stdout
    assert done.stdout.strip().endswith("report.html")
    return root / "report.html"


@pytest.mark.slow
def test_the_report_says_what_was_run_on_what_and_why_not(made: Path) -> None:
    text = re.sub(r"<script>.*?</script>", "", made.read_text(), flags=re.S)
    assert [f'id="{name}"' in text for name in ("cknna", "dynamics", "patching", "attention")] == [
        True,
        True,
        True,
        False,
    ]
    assert text.count('class="warn"') == 1
    assert "has no checkpoints from before its last step" in text
    assert "What the numbers are, and what they are not" in text
    assert "never 0 by chance" in text
    for fact in (
        "shapes:val, 3 images",
        "torch 2.",
        "efficientnet-lite0",
        "python -m analyses.patching --model",
        "--source",
    ):
        assert fact in text, fact
    csv = re.search(r'download="cknna.csv" href="data:text/csv;base64,([^"]+)"', text)
    assert csv is not None
    assert base64.b64decode(csv[1]).decode().startswith("model,")
    # --vfm reached every analysis that has it
    assert "dinov2-small" not in re.sub(r"<details>.*?</details>", "", text, flags=re.S)


def test_nothing_is_fetched_and_plotly_is_there_once(made: Path) -> None:
    text = made.read_text()
    tags = re.findall(
        r"<(?:script|link|img|iframe|style|form|video|object|embed)\b[^>]*>",
        re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.S),
    )
    assert tags
    assert not [tag for tag in tags if "http" in tag or " src=" in tag]
    (packed,) = re.findall(r'<script id="plotly" type="text/plain">([^<]*)</script>', text)
    assert gzip.decompress(base64.b64decode(packed)).decode() == fig.javascript()
    assert len(packed) < 2_100_000
    assert "connect-src" not in html_page.POLICY
    assert html_page.POLICY.startswith("default-src 'none'")


@pytest.mark.slow
def test_a_second_report_looks_up_what_is_stored(made: Path, runs_folder: Path) -> None:
    stored = {folder: (folder / "run.json").stat().st_mtime_ns for folder in (made.parent / "runs").glob("[!.]*")}
    words = [
        "--only",
        "cknna",
        "--limit",
        "3",
        "--vfm",
        "efficientnet-lite0",
        "--output_dir",
        str(made.parent / "runs"),
    ]
    run("analyses.all", "--model", str(runs_folder / "viral"), *words, "--report", str(made.parent / "second.html"))
    assert stored == {
        folder: (folder / "run.json").stat().st_mtime_ns for folder in (made.parent / "runs").glob("[!.]*")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "VIRAL", "--only", "cknn"], "unknown analysis 'cknn'"),
        (["--model", "VIRAL", "--only", "all"], "unknown analysis 'all'"),
        (["--model", "VIRAL", "--vfm", "dinov2-smal"], "did you mean 'dinov2-small'"),
        (["--model", "VIRAL", "--limti", "3"], "unknown option '--limti': did you mean '--limit'"),
        (["--model", "VIRAL", "VIRAL"], "is given twice: expected each model once"),
        ([], "no model given"),
    ],
)
def test_bad_input_is_one_sentence(runs_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    given = [word.replace("VIRAL", str(runs_folder / "viral")) for word in words]
    assert message in refused(
        "analyses.all", *given, "--report", str(tmp_path / "report.html"), "--output_dir", str(tmp_path / "out")
    )
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_analyses_holds_files_only() -> None:
    assert {"cknna", "dynamics", "permutation"} <= set(analysis_files())
    assert "all" not in analysis_files()
    listed = run("analyses").stdout
    assert [line.split()[0] for line in listed.split("\n\n")[0].splitlines()] == list(analysis_files())


def test_flags_of_a_config_make_the_same_config() -> None:
    config: Any = DYNAMICS.config(limit=7, layers=(0, 2), types=("count",), data="folder:my photos")
    assert parse(DYNAMICS.config, changed_flags(config), prog="test") == config
    assert changed_flags(DYNAMICS.config()) == []
    plain = KNOCKOUT.config(objects=False)  # type: ignore[call-arg]
    assert parse(KNOCKOUT.config, changed_flags(plain), prog="test") == plain


def test_the_command_of_an_analysis_has_every_option_that_it_ran_with(tmp_path: Path) -> None:
    config: Any = DYNAMICS.config(limit=7)
    where = Where(
        model=("a", "b"),
        output_dir=tmp_path / "my runs",
        ids=tmp_path / "ids.txt",
        batch_size=4,
        dtype="bfloat16",
        load_in="4bit",
        revision="v1",
        trust_remote_code=True,
        export=tmp_path / "paper",
    )
    words = command_of("dynamics", "name=a", config, where)
    command = dataclasses.make_dataclass("Command", [], bases=(DYNAMICS.config, Where), frozen=True)
    parsed = parse(command, words[words.index("--model") :], prog="test")
    assert words[:3] == ["python", "-m", "analyses.dynamics"]
    assert {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Where)} == dataclasses.asdict(
        dataclasses.replace(where, model=("name=a",), export=None)
    )
    assert parsed.limit == 7


def test_a_damaged_ledger_costs_no_report(tmp_path: Path) -> None:
    record = {"analysis": "claims", "label": "claims", "model": "runs", "data": "", "config": {}, "seconds": 1.0}
    stored = Run("k", record | {"created": "2026-01-01"}, {"claims": pd.DataFrame({"a": [1]})})
    folder = stored.save(tmp_path)
    ledger, why = ledger_of(tmp_path)
    assert (ledger is not None, why) == (True, "")
    (folder / "claims.parquet").write_bytes(b"PAR1")
    ledger, why = ledger_of(tmp_path)
    assert ledger is None
    assert "is not a readable run" in why
    (folder / "claims.parquet").unlink()
    stored.tables["claims"].to_parquet(folder / "claims.parquet")
    (folder / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="is not a readable run"):
        runs.load(folder)


def test_labels_with_markup_are_text_in_the_figures_of_runs(tmp_path: Path) -> None:
    stored = runs.load(cknna(tmp_path, "a<b>c", {0: [0.1, 0.2], 1: [0.3, 0.4]}))
    for drawn in (stored.figures(), compare([stored]).figures()):
        names = {trace.name or "" for figure in drawn.values() for trace in figure.data}
        assert any("a&lt;b&gt;c" in name for name in names)
        assert not any("<b>" in name for name in names)


def evil_page() -> str:
    figure = new_figure(title=EVIL).add_scatter(x=[1, 2], y=[1, 2], name=EVIL, hovertext=[EVIL, EVIL])
    table = pd.DataFrame({"model": [EVIL] * 20, "score": 0.5})
    section = report.Section(DYNAMICS, [EVIL], [EVIL], [["python", EVIL]], {EVIL: figure}, table)
    return report.page(EVIL, {EVIL: EVIL}, [section])


def test_names_are_escaped() -> None:
    page = evil_page()
    assert "</script><script>document" not in page
    assert "<img src=http" not in page
    assert "<details><summary>Table, 20 rows" in page


@pytest.mark.browser
def test_in_a_real_browser_without_a_network(made: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        assert not os.environ.get("CI"), "chromium is not installed: run make browser"
        pytest.skip("chromium is not installed: run make browser")
    (tmp_path / "evil.html").write_text(evil_page())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        context = browser.new_context(offline=True)
        requests: list[str] = []
        errors: list[str] = []
        context.on("request", lambda request: requests.append(request.url))
        for file in (made, tmp_path / "evil.html"):
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.goto(f"file://{file}")
            page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
            count = page.locator(".plotly-graph-div").count()
            assert count >= 1
            assert page.locator(".js-plotly-plot .main-svg").first.is_visible()
            assert page.evaluate(
                "[...document.querySelectorAll('.js-plotly-plot')].every(d => d.querySelector('.main-svg'))"
            )
            assert page.locator(".js-plotly-plot").count() == count
            buttons = page.evaluate(
                "[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title ||"
                " b.getAttribute('aria-label') || '')"
            )
            assert buttons
            assert not [title for title in buttons if re.search("cloud|chart studio|edit in|plotly", title, re.I)]
            assert page.title() != "taken"
        browser.close()
    assert not errors
    assert [url for url in requests if not url.startswith(("file://", "data:", "blob:"))] == []
