"""Jobs of the dashboard: started, watched, stopped and failed as real processes, with arguments as a list and on this
machine only."""

from __future__ import annotations

import copy
import dataclasses
import http.client
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from tests.workbench.dashboard.test_dashboard import CHROMIUM, chromium_or_skip, open_page, started, two_models
from workbench import runs
from workbench.analysis.discover import load_analyses, load_analysis
from workbench.analysis.drawn import options_of
from workbench.cli import parse
from workbench.dashboard import access, form, new_run
from workbench.dashboard import jobs as module
from workbench.dashboard.jobs import Job, Jobs, jobs
from workbench.errors import RunError


@pytest.fixture
def own() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    made.end_all()


@pytest.fixture(autouse=True)
def no_jobs_of_other_tests() -> Iterator[None]:
    jobs().newest.clear()
    yield
    jobs().end_all()
    jobs().newest.clear()


@pytest.fixture(autouse=True)
def the_browser_has_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit's test harness has no cookies of its own."""
    cookies = {access.cookie_name(): access.token()}
    monkeypatch.setattr(type(st.context), "cookies", cookies)


def wait(job: Job, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while job.state == "running":
        assert time.monotonic() < deadline, job.lines()
        time.sleep(0.05)


def python(code: str) -> list[str]:
    return ["python", "-c", code]


def test_a_job_shows_the_newest_state_of_its_bar(own: Jobs) -> None:
    bar = "import time; from workbench.progress import Bar; bar = Bar(desc='reading (a)', total=4, mininterval=0)"
    job = own.start("x", python(f"{bar}; bar.update(2); time.sleep(60)"))
    assert job.progress() is None
    while (job.progress() or (0.0,))[0] < 0.5:
        time.sleep(0.02)
    assert job.progress() == (0.5, "reading (a): 2 of 4")
    (line,) = job.lines()
    assert line.startswith("reading (a):  50%")
    with pytest.raises(RunError, match="a job of 'x' is running already"):
        own.start("x", python("0"))
    assert own.start("y", python("0")).process.wait() == 0  # another analysis may run beside it
    job.stop()
    wait(job, 20)
    assert job.state == "stopped"


def test_a_job_that_does_not_listen_is_ended(own: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    deaf = (
        "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)];"
        " print('deaf', flush=True); time.sleep(60)"
    )
    job = own.start("x", python(deaf))
    while not job.lines():
        time.sleep(0.02)
    job.stop()
    wait(job, 20)
    assert job.state == "stopped"
    assert job.process.returncode == -9


def test_a_failure_is_its_own_sentence(own: Jobs) -> None:
    said = own.start(
        "x",
        python("from workbench.cli import command; from pathlib import Path; command(lambda _: Path('/no').stat())"),
    )
    wait(said)
    assert said.state == "failed"
    assert said.error() == "No such file or directory: /no"
    crashed = own.start("x", python("raise SystemError('boom')"))
    wait(crashed)
    assert crashed.state == "failed"
    assert crashed.error() == "the command ended with code 1 after: SystemError: boom"


def test_no_shell_sees_the_arguments(own: Jobs, tmp_path: Path) -> None:
    evil = f"$(touch {tmp_path}/a); touch {tmp_path}/b `touch {tmp_path}/c`"
    job = own.start("x", [*python("import sys; print(sys.argv[1])"), evil])
    wait(job)
    assert job.lines() == [evil]
    assert list(tmp_path.iterdir()) == []


def test_added_jobs_run_one_after_the_other_and_can_be_taken_out(own: Jobs, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def code(name: str, seconds: float) -> list[str]:
        write = f"open({str(log)!r}, 'a').write"
        return python(f"import time; {write}('{name} begins '); time.sleep({seconds}); {write}('{name} ends ')")

    own.add("a", code("a", 0.6))
    for name in ("b", "c", "d"):
        own.add(name, code(name, 0.1))
    assert list(own.waiting) == ["b", "c", "d"]
    with pytest.raises(RunError, match="a job of 'c' waits already"):
        own.add("c", python("0"))
    own.remove("c")
    deadline = time.monotonic() + 60
    while "d" not in own.newest:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait(own.newest["d"])
    assert log.read_text().split() == [word for name in "abd" for word in (name, "begins", name, "ends")]
    assert not own.waiting


def test_a_job_that_fails_does_not_hold_the_queue(own: Jobs) -> None:
    own.add("a", python("import time; time.sleep(0.5); raise SystemExit(3)"))
    own.add("b", python("0"))
    deadline = time.monotonic() + 60
    while "b" not in own.newest:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait(own.newest["b"])
    assert [own.newest[name].state for name in "ab"] == ["failed", "done"]


# --- on the page ----------------------------------------------------------------------------------


def filled_form(root: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> AppTest:
    """The form of CKNNA with a small question filled in, on an empty runs folder that holds the model."""
    shutil.copytree(models / "viral", root / "viral", ignore=shutil.ignore_patterns("checkpoint-*"))
    app = open_page("evidence", root, monkeypatch, part="new", analysis="cknna")
    app.number_input(key="new-cknna-limit").set_value(3)
    app.number_input(key="new-cknna-null").set_value(10)
    app.text_input(key="new-cknna-layers").set_value("1")
    app.number_input(key="new-cknna-k").set_value(5)
    app.multiselect(key="on").set_value(["viral"]).run()
    assert not app.exception
    return app


@pytest.mark.slow
def test_the_form_of_an_analysis_is_its_command(runs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults add nothing; what is changed becomes a flag that the command line takes."""
    app = open_page("evidence", runs_folder, monkeypatch, part="new", analysis="cknna")
    models = f"--model {runs_folder}/baseline {runs_folder}/viral"
    assert app.code[-1].value == f"python -m analyses.cknna {models} --output_dir {runs_folder}"
    app.number_input(key="new-cknna-k").set_value(7)
    app.selectbox(key="new-cknna-pooling").set_value("pooled")
    app.multiselect(key="new-cknna-vfm").set_value(["dinov2-small", "efficientnet-lite0"])
    app.text_input(key="new-cknna-layers").set_value("0 2").run()
    assert "shapes:val" in app.selectbox(key="new-cknna-data").options
    flags = ["--vfm", "dinov2-small", "efficientnet-lite0", "--layers", "0", "2", "--k", "7", "--pooling", "pooled"]
    assert app.code[-1].value == f"python -m analyses.cknna {models} {' '.join(flags)} --output_dir {runs_folder}"
    assert parse(load_analysis("cknna").config, flags, prog="test").k == 7


def test_the_form_is_in_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = two_models(tmp_path)
    fields = json.loads(json.dumps(options_of(load_analysis("cknna").config)))
    monkeypatch.setattr(new_run, "options", lambda _: copy.deepcopy(fields))  # another process answers the same
    app = open_page("evidence", two, monkeypatch, part="new", analysis="cknna")
    assert not [key for key in app.query_params if key.startswith("o-")]
    app.number_input(key="new-cknna-k").set_value(7)
    app.multiselect(key="new-cknna-vfm").set_value(["dinov2-small", "efficientnet-lite0"])
    app.selectbox(key="new-cknna-pooling").set_value("pooled")
    app.text_input(key="new-cknna-layers").set_value("0 2")
    app.multiselect(key="on").set_value(["viral"]).run()
    copied = {key: app.query_params[key] for key in list(app.query_params)}
    assert copied["o-layers"] == ["0", "2"]
    again = open_page("evidence", two, monkeypatch, **copied)
    command = f"python -m analyses.cknna --model {two}/viral --vfm dinov2-small efficientnet-lite0"
    assert app.code[-1].value == f"{command} --layers 0 2 --k 7 --pooling pooled --output_dir {two}"
    assert again.code[-1].value == app.code[-1].value
    again.segmented_control(key="part").set_value("runs").run()
    again.segmented_control(key="part").set_value("new").run()
    assert again.code[-1].value == app.code[-1].value
    wrong = {"o-k": "-5", "o-pooling": ["pooled", "x"], "o-fog": "1"}
    app = open_page("evidence", two, monkeypatch, part="new", analysis="cknna", **wrong)
    assert {warning.value.replace("\\", "") for warning in app.warning} == {
        "The link names k -5, which does not fit; shown is 10.",
        "The link names pooling pooled x, which does not fit; shown is within.",
        "The link names the option fog, which cknna does not have; shown is the form without it.",
    }
    assert not [key for key in app.query_params if key.startswith("o-")]


def test_a_value_of_each_option_is_the_same_after_the_address() -> None:
    for analysis in load_analyses().values():
        for field in options_of(analysis.config):
            default = form._default(field)
            assert form._words(field, default) is None
            changed = {
                "bool": [default is False],
                "int": [field["high"] or 77],
                "float": [field["high"] or field["low"] or 0.25],
            }
            changed |= {"choice": field["choices"], "words": ["a b"], "text": ["a b", ""]}
            for value in changed[field["kind"]]:
                value = ["a b", "c"] if field["kind"] == "words" and field["choices"] else value
                if (words := form._words(field, value)) is not None:
                    assert form._value(field, words) == value, (analysis.name, field["name"])


def test_every_option_of_every_analysis_is_in_its_form() -> None:
    for analysis in load_analyses().values():
        fields = {field["name"]: field for field in options_of(analysis.config)}
        assert list(fields) == [field.name for field in dataclasses.fields(analysis.config)]
        assert all(field["help"] for field in fields.values()), analysis.name


@pytest.mark.slow
def test_the_form_starts_its_command_and_the_result_appears(
    runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = filled_form(tmp_path, monkeypatch, runs_folder)
    app.button(key="start-job").click().run()
    job = jobs().newest["cknna"]
    assert " ".join(job.words) == app.code[-1].value
    assert job.process.args[0] == sys.executable
    assert app.button(key="stop-cknna")
    assert app.button(key="start-job").disabled
    assert any("Running for" in caption.value for caption in app.caption)
    wait(job)
    app.run()
    assert job.state == "done", job.lines()
    (key,) = runs.index(tmp_path)["key"]
    assert app.success
    assert not app.exception
    stored = open_page("evidence", tmp_path, monkeypatch, part="runs").dataframe[0].value
    assert stored[["model", "key"]].to_numpy().tolist() == [["viral", key]]


@pytest.mark.slow
def test_a_failed_job_shows_its_sentence(runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = filled_form(tmp_path, monkeypatch, runs_folder)
    app.text_input(key="new-cknna-layers").set_value("99").run()
    app.button(key="start-job").click().run()
    wait(jobs().newest["cknna"])
    app.run()
    said = [error.value.replace("\\", "") for error in app.error]
    assert said == [f"cknna: layer 99 does not exist in {tmp_path}/viral: expected 0 to 3"]
    assert runs.index(tmp_path).empty


def test_stopping_from_the_page(runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = filled_form(tmp_path, monkeypatch, runs_folder)
    app.button(key="start-job").click().run()
    app.button(key="stop-cknna").click().run()
    wait(jobs().newest["cknna"], 30)
    app.run()
    assert app.warning
    assert "Stopped" in app.warning[0].value
    assert runs.index(tmp_path).empty


def test_an_option_cannot_be_smuggled_in_and_other_machines_start_nothing(
    runs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = filled_form(tmp_path, monkeypatch, runs_folder)
    app.text_input(key="new-cknna-layers").set_value("1 --output_dir /elsewhere").run()
    assert app.button(key="start-job").disabled
    assert "'--output\\_dir' begins with a dash" in app.error[0].value
    for address, allowed in (
        ("127.0.0.1", True),
        ("0.0.0.0", False),
        ("", False),
        (None, False),
        ("192.168.0.4", False),
    ):
        monkeypatch.setattr(st, "get_option", lambda _, address=address: address)
        assert access.is_local() is allowed
    app.run()
    assert "start-job" not in [button.key for button in app.button]
    assert any("served to this machine alone" in caption.value for caption in app.caption)


# --- the token ------------------------------------------------------------------------------------


def asked(url: str, cookie: str = "") -> tuple[int, str, str]:
    """Status, place to go to and cookie that a server answers."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    return answer.status, answer.getheader("location", ""), answer.getheader("set-cookie", "")


def printed(lines: Iterator[str]) -> str:
    """The address that the dashboard prints."""
    return next(line for line in lines if line.startswith("Dashboard: ")).split()[1]


def test_the_token_becomes_a_cookie_and_leaves_the_address(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        address = printed(server.stdout)
        where, _, token = address.partition("?token=")
        assert len(token) == 32
        status, place, cookie = asked(f"{where}layers?b=a+b&token={token}&m=x&m=&l=1")
        assert (status, place) == (303, "?b=a+b&m=x&m=&l=1")
        port = where.rstrip("/").rpartition(":")[2]
        assert cookie == f"viral-{port}={token}; HttpOnly; Path=/; SameSite=strict"
        for wrong in ("", "x", token[:-1], f"{token}x", "%C3%BC"):
            status, place, cookie = asked(f"{where}?token={wrong}")
            assert (status, place, cookie) == (303, "?", "")
        assert asked(f"{where}/elsewhere.org/?token={token}")[1] == "?"  # no other host
        assert asked(where)[0] == 200
        (file,) = [f for f in Path(tempfile.gettempdir()).glob("viral-dashboard-*") if f.read_text().strip() == address]
        assert file.stat().st_mode & 0o777 == 0o600
    assert not file.exists()


def test_the_token_of_the_environment_is_used(tmp_path: Path) -> None:
    with started(tmp_path, VIRAL_TOKEN="given") as server:
        assert printed(server.stdout).endswith("/?token=given")


@pytest.mark.slow
@pytest.mark.browser
def test_jobs_are_started_with_the_token_alone_and_end_with_the_server(runs_folder: Path, tmp_path: Path) -> None:
    """The owner starts and stops; whoever reaches the same address without the token sees what runs."""
    from playwright.sync_api import expect, sync_playwright

    shutil.copytree(runs_folder / "viral", tmp_path / "viral", ignore=shutil.ignore_patterns("checkpoint-*"))
    part = "evidence?part=new&analysis=cknna"
    with sync_playwright() as playwright, started(tmp_path) as server:
        address = printed(server.stdout)
        where = address.partition("?")[0]
        browser = playwright.chromium.launch(executable_path=chromium_or_skip(), args=CHROMIUM)
        owner, other = (browser.new_context().new_page() for _ in range(2))
        owner.goto(address)
        expect(owner).to_have_url(re.compile(rf"^{re.escape(where)}(\?(?!.*token).*)?$"))
        owner.goto(f"{where}{part}")
        start = owner.get_by_role("button", name="Start", exact=True)
        expect(start).to_be_enabled(timeout=60_000)
        owner.get_by_label("limit", exact=True).fill("5000")
        owner.keyboard.press("Enter")
        expect(owner.get_by_text("--limit 5000").first).to_be_visible(timeout=30_000)
        start.click()
        expect(owner.get_by_role("button", name="Stop", exact=True)).to_be_visible(timeout=60_000)
        other.goto(f"{where}{part}&token=wrong")
        expect(other.get_by_text("Running for")).to_be_visible(timeout=60_000)
        expect(
            other.get_by_text(re.compile("open the address with the token that the dashboard printed"))
        ).to_be_visible()
        for name in ("Start", "Start, after the others", "Stop"):
            assert other.get_by_role("button", name=name, exact=True).count() == 0
        owner.reload()  # the browser still has the right
        expect(owner.get_by_role("button", name="Stop", exact=True)).to_be_visible(timeout=60_000)
        (job,) = [each for each in psutil.Process(server.pid).children() if "analyses.cknna" in each.cmdline()]
        server.terminate()
        server.wait(timeout=30)
        job.wait(timeout=30)
        browser.close()
