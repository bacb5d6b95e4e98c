"""`make demo`: its commands are real, its progress is true, it goes on, it stops, and the first page fills itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import ROOT, SMALL, refused
from tests.workbench.dashboard.test_dashboard import CHROMIUM, chromium_or_skip, open_page, serve
from trainer.sweep.spec import Sweep
from workbench import demo
from workbench.cli import parse
from workbench.dashboard import live
from workbench.demo import Children, Config, Progress, Stage, children, stages
from workbench.errors import RunError
from workbench.overview.models import files_below
from workbench.package_files import RECIPES, SWEEPS

GOOD, BAD = ("-c", "print('done')"), ("-c", "raise SystemExit(3)")


def staged(monkeypatch: pytest.MonkeyPatch, *made: Stage) -> None:
    monkeypatch.setattr(demo, "stages", lambda config: list(made))


def gone(process: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# --- what it runs ---------------------------------------------------------------------------------


def test_the_makefile_runs_it_and_it_trains_what_it_analyses() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^demo: env\n\t\$\(BIN\)/python -m workbench\.demo --runs \$\(RUNS\) \$\(if \$\(HEADLESS\),--headless\)$",
        makefile,
        re.M,
    )
    sweep = parse(Sweep, [], prog="sweep", recipe=SWEEPS.find(Config().sweep))
    assert [job.folder for job in sweep.runs()] == [Config().runs / name for name in demo.MODELS]
    assert sweep.processes == 2


def test_the_pair_differs_in_alignment_alone_and_is_small() -> None:
    from trainer.recipe import Recipe

    sweep = parse(Sweep, [], prog="sweep", recipe=SWEEPS.find(Config().sweep))
    first, second = (
        parse(Recipe, job.arguments[1:], prog="trainer", recipe=RECIPES.find(job.arguments[0])) for job in sweep.runs()
    )
    assert replace(second, alignment=first.alignment, output_dir=first.output_dir) == first
    assert not first.alignment.aligned
    assert second.alignment.aligned
    # ten minutes on two cores
    assert first.start is None
    assert first.optim.steps <= 600
    assert (first.data.limit_train or 9999) <= 300
    assert first.keep_checkpoints is None
    assert first.save_every < first.optim.steps


@pytest.mark.parametrize("stage", stages(Config()), ids=lambda stage: stage.words[1])
def test_every_stage_is_a_command_whose_options_exist(stage: Stage, tmp_path: Path) -> None:
    """Given with an option that does not exist, each refuses that one alone."""
    assert "unknown option '--xyz'" in refused(*stage.words[1:], "--xyz", "1")


def test_a_sweep_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("workbench.demo", "--sweep", "dmeo").endswith("did you mean 'demo'?")
    assert "no sweep mine/demo.yaml: expected a YAML file" in refused("workbench.demo", "--sweep", "mine/demo.yaml")
    assert not list(tmp_path.iterdir())


# --- how far it is --------------------------------------------------------------------------------


def test_every_stage_is_run_and_its_state_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs" / demo.PROGRESS_FILE
    look = ("-c", f"import json; print([stage['state'] for stage in json.load(open({str(file)!r}))['stages']])")
    staged(monkeypatch, Stage("first", GOOD), Stage("broken", BAD), Stage("look", look, needed=True))
    assert demo.run(Config(tmp_path / "runs", headless=True), Children()) == ["broken"]
    assert "['done', 'failed', 'running']" in capfd.readouterr().out
    progress = Progress.read(tmp_path / "runs")
    assert progress is not None
    assert [stage.state for stage in progress.stages] == ["done", "failed", "done"]
    assert progress.alive
    assert all(0 <= stage.cpu < 10 and 0 <= stage.seconds < 60 for stage in progress.stages)


def test_what_others_need_stops_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(monkeypatch, Stage("broken", BAD, needed=True), Stage("never", GOOD))
    with pytest.raises(RunError, match="broken: the command above ended with code 3: see its message"):
        demo.run(Config(tmp_path, headless=True), Children())
    progress = Progress.read(tmp_path)
    assert progress is not None
    assert [stage.state for stage in progress.stages] == ["failed", "waiting"]


def test_progress_that_cannot_be_read_is_none_and_a_dead_demo_was_interrupted(tmp_path: Path) -> None:
    assert Progress.read(tmp_path) is None
    made = Progress(
        (Stage("a", GOOD, state="done"), Stage("b", GOOD, state="running"), Stage("c", GOOD)),
        os.getpid(),
        "http://127.0.0.1:1",
    )
    made.write(tmp_path)
    assert Progress.read(tmp_path) == made
    with subprocess.Popen(["true"]) as dead:
        pass
    replace(made, process=dead.pid).write(tmp_path)
    read = Progress.read(tmp_path)
    assert read is not None
    assert not read.alive
    assert [stage.state for stage in read.stages] == ["done", "stopped", "waiting"]
    whole = (tmp_path / demo.PROGRESS_FILE).read_text()
    for text in (
        "",
        whole[:-20],
        "[]",
        "{}",
        json.dumps({"stages": [{"title": "a"}]}),
        json.dumps(json.loads(whole) | {"other": 1}),
    ):
        (tmp_path / demo.PROGRESS_FILE).write_text(text)
        assert Progress.read(tmp_path) is None


# --- going on and stopping ------------------------------------------------------------------------


@pytest.mark.slow
def test_it_trains_says_three_sentences_and_a_second_run_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training and summary as they are, with small models; `make demo` runs the analyses between them, which have tests
    of their own."""
    flags = " ".join(SMALL).replace("--optim.steps 12", "--optim.steps 4") + " --data.limit_test 8"
    (tmp_path / "small.yaml").write_text(
        f"seeds: [0]\nsuffix: false\nvariants:\n  - 'baseline: {ROOT}/trainer/recipes/demo_baseline.yaml {flags}'\n  -"
        f" 'viral: {ROOT}/trainer/recipes/demo_viral.yaml {flags} --alignment.layer 2'\n"
    )
    config = Config(tmp_path / "runs", headless=True, sweep=str(tmp_path / "small.yaml"))
    training, summary = (stage for stage in stages(config) if stage.words[1] in ("trainer.sweep", "workbench.summary"))
    staged(monkeypatch, training, summary)
    monkeypatch.chdir(ROOT)
    assert demo.run(config, Children()) == []
    said = capfd.readouterr().out
    assert re.search(
        r"^1\. Two models were trained alike, on the same 24 images of shapes:train, for 4 steps, with seed 0",
        said,
        re.M,
    )
    assert re.search(r"^2\. On \d+ questions about 8 images of shapes:test, baseline answers", said, re.M)
    assert re.search(r"^3\. Open next: .*`viral app --runs", said, re.M)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/training.*")}
    assert len(written) == 4
    assert demo.run(config, Children()) == []
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/training.*")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_and_the_dashboard(number: signal.Signals, tmp_path: Path) -> None:
    """Sent to the demo alone, as `kill` does; Ctrl-C reaches its children too, which makes it no harder."""
    sleeping = "import time; print('asleep', flush=True); time.sleep(600)"
    code = (
        f"from workbench import demo; demo.stages = lambda config: [demo.Stage('sleep', ('-c', {sleeping!r}))];"
        " demo.command(demo.main)"
    )
    words = [sys.executable, "-c", code, "--runs", str(tmp_path)]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        # a test run in the background of a shell ignores Ctrl-C, and so would the demo
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "asleep\n":
            break
    own = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    # at once
    assert len(own) == 2
    assert re.fullmatch(
        r"== the dashboard, which updates by itself: http://127\.0\.0\.1:\d+/\?token=[\w-]{32}\n", said[0]
    )
    process.send_signal(number)
    assert process.wait(60) == 130
    assert all(map(gone, own))
    progress = Progress.read(tmp_path)
    assert progress is not None
    assert [stage.state for stage in progress.stages] == ["stopped"]


def test_a_child_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENCE", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    with children() as own:
        process = own.start(["-c", deaf], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"deaf\n"
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


# --- the first page -------------------------------------------------------------------------------


def half_trained(source: Path, target: Path, rows: int) -> None:
    """A training as it lies there while it runs."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "recipe.yaml", target)
    pd.read_parquet(source / "training.parquet").iloc[:rows].to_parquet(target / "training.parquet")


def test_the_page_shows_what_runs_and_what_is_to_come(
    runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_trained(runs_folder / "baseline", tmp_path / "baseline", 3)
    Progress(
        (
            Stage("a", GOOD, state="done", seconds=7.2),
            Stage("b", GOOD, state="running", started="2026-11-26T03:04:05+00:00"),
            Stage("c", GOOD),
        ),
        os.getpid(),
    ).write(tmp_path)
    app = open_page("home", tmp_path, monkeypatch)
    said = "\n".join(markdown.value for markdown in app.markdown)
    assert "a: 7 s" in said
    assert "b: since 03:04:05 UTC" in said
    assert "c: still to come" in said
    assert not [w for w in app.warning if "interrupted" in w.value]
    assert app.selectbox(key="b").value == "baseline"
    seen = live.contents(tmp_path)
    half_trained(runs_folder / "viral", tmp_path / "viral", 2)
    assert live.contents(tmp_path) != seen
    app.run()  # as the fragment does, without a click: what is new is chosen
    assert app.multiselect(key="m").value == ["viral"]
    assert "viral also learns" in "\n".join(m.value for m in app.markdown)
    assert app.get("plotly_chart")  # the curves so far
    table = open_page("models", tmp_path, monkeypatch).dataframe[0].value
    assert table["state"].tolist() == ["at step 4 of 12", "at step 2 of 12"]


def test_the_page_leaves_a_choice_alone(runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("baseline", "viral"):
        half_trained(runs_folder / name, tmp_path / name, 3)
    app = open_page("home", tmp_path, monkeypatch)
    app.multiselect(key="m").set_value([]).run()
    half_trained(runs_folder / "baseline", tmp_path / "a_third", 3)
    app.run()
    assert app.multiselect(key="m").value == []


def test_a_half_written_file_does_not_break_the_page(
    runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_trained(runs_folder / "baseline", tmp_path / "baseline", 3)
    half_trained(runs_folder / "viral", tmp_path / "viral", 3)
    log = tmp_path / "viral" / "training.parquet"
    log.write_bytes(log.read_bytes()[:100])
    (tmp_path / "viral" / "recipe.yaml").write_text("optim: [")
    (tmp_path / demo.PROGRESS_FILE).write_text('{"stages": [')
    hidden = tmp_path / ".cknna-0123456789ab.x1y2z3w4"  # a run that is being written
    shutil.copytree(next(runs_folder.glob("cknna-*")), hidden)
    for page in ("home", "models", "layers", "examples", "evidence"):
        open_page(page, tmp_path, monkeypatch)
    table = open_page("models", tmp_path, monkeypatch).dataframe[0].value
    assert table["key"].tolist() == ["baseline", "viral"]
    assert table["state"].tolist() == ["at step 4 of 12", "at step 0"]
    runs = open_page("evidence", tmp_path, monkeypatch, part="runs")
    assert any("No analysis is stored yet" in info.value for info in runs.info)


def test_a_folder_that_goes_while_it_is_looked_into_does_not_break_the_page(
    runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `.unfinished`, `final` and the folders of runs do."""
    half_trained(runs_folder / "baseline", tmp_path / "baseline", 3)
    (tmp_path / "baseline" / "final").mkdir()
    scandir, went = os.scandir, []

    def late(path: str = ".") -> Any:
        if Path(path).name == "final":
            went.append(path)
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    assert [file.name for file in files_below(tmp_path, "training.*")] == ["training.parquet"]
    assert len(went) == 1
    (tmp_path / "baseline" / "final").mkdir()
    assert open_page("home", tmp_path, monkeypatch).selectbox(key="b").value == "baseline"
    assert len(went) == 2


def test_two_finished_models_are_compared_in_words(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(element.value for element in open_page("home", runs_folder, monkeypatch).markdown)
    assert "viral also learns to make its visual tokens resemble" in text
    assert "One training each" in text


@pytest.mark.browser
def test_the_page_fills_itself_in_a_real_browser(runs_folder: Path, tmp_path: Path) -> None:
    """Opened on an empty folder and never touched again."""
    from playwright.sync_api import expect, sync_playwright

    chromium = chromium_or_skip()
    with serve(tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(address)
        expect(page.get_by_text("Nothing is stored in")).to_be_visible(timeout=60_000)
        Progress((Stage("both trainings", GOOD, state="running"), Stage("analyses", GOOD)), os.getpid()).write(tmp_path)
        half_trained(runs_folder / "baseline", tmp_path / "baseline", 3)
        expect(page.get_by_text("analyses: still to come")).to_be_visible(timeout=60_000)
        half_trained(runs_folder / "viral", tmp_path / "viral", 3)
        expect(page.get_by_text("baseline vs viral")).to_be_visible(timeout=60_000)
        # the browser reads plotly first
        expect(page.locator(".js-plotly-plot .annotation-text").get_by_text("viral").first).to_be_visible(
            timeout=180_000
        )
        assert page.locator("[data-testid=stException]").count() == 0
        browser.close()
