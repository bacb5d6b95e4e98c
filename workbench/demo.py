"""Run the demo: start the dashboard, train a baseline and a VIRAL model, run every analysis, print a summary.

python -m workbench.demo
python -m workbench.demo --runs runs --headless

`viral demo` and `make demo` run this module. Every stage is a command that can also be run by itself, and each skips
what is already stored: an interrupted demo continues where it stopped, and a second one is quick. RUNS/demo.json stores
the progress, for the dashboard's first page. Ctrl-C and SIGTERM stop the commands and the dashboard.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from workbench.cli import command, parse
from workbench.errors import RunError
from workbench.files import atomic_file, make_folder
from workbench.package_files import SWEEPS
from workbench.processes import environment, python
from workbench.runs import now
from workbench.yaml_config import read_recipe

State = Literal["waiting", "running", "done", "failed", "stopped"]
PROGRESS_FILE = "demo.json"
MODELS = ("baseline", "viral")  # what the sweep trains
PORT = 8501  # the first port to try for the dashboard
DATA = "shapes:test"  # of the analyses: the images of the questions, so that both can be seen together
PATIENCE = 30.0  # seconds that a command has to stop before it is killed; the sweep gives its trainings 20


@dataclass(frozen=True)
class Config:
    """Options of the demo: its folder and its size."""

    runs: Path = Path("runs")
    """The folder for models, analyses and the report."""
    headless: bool = False
    """Run without the dashboard."""
    sweep: str = "demo"
    """The sweep that trains `baseline` and `viral`: the name of one in the package, or the path of a YAML file."""
    limit: int = 40
    """Number of images in each analysis."""
    cknna_limit: int = 100
    """Number of images for CKNNA with both VFMs; larger than --limit because CKNNA takes little time per image."""


@dataclass(frozen=True)
class Stage:
    """One command of the demo and its state.

    Attributes:
        words: the command line after `python`.
        needed: whether the demo ends if this stage fails.
        started: the time at which it started, in ISO 8601; "" before that.
        seconds: how long it took, in seconds of wall-clock time.
        cpu: how long it took, in CPU seconds of all cores.
    """

    title: str
    words: tuple[str, ...]
    needed: bool = False
    state: State = "waiting"
    started: str = ""
    seconds: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True)
class Progress:
    """The progress of a demo, as stored in its file.

    Attributes:
        process: process id of the demo.
        address: address of the dashboard, "" if there is none.
    """

    stages: tuple[Stage, ...]
    process: int = 0
    address: str = ""

    @classmethod
    def read(cls, runs: Path) -> Progress | None:
        """Return the progress stored in `runs`, or None if there is no file or it cannot be read.

        If the demo's process has died, a stage that is stored as running is returned as stopped.
        """
        try:
            content = json.loads((runs / PROGRESS_FILE).read_text())
            stages = tuple(Stage(**stage | {"words": tuple(stage["words"])}) for stage in content.pop("stages"))
            progress = cls(stages, **content)
            return progress if progress.alive else replace(progress, stages=tuple(map(_cut_off, stages)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write(self, runs: Path) -> None:
        """Store the progress in `runs`; the file is replaced atomically."""
        with atomic_file(make_folder(runs) / PROGRESS_FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2))

    @property
    def alive(self) -> bool:
        """Whether the process of the demo still exists."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return self.process > 0

    def changed(self, number: int, **values: Any) -> Progress:
        """Return a copy in which the fields `values` of stage `number` are replaced."""
        stages = list(self.stages)
        stages[number] = replace(stages[number], **values)
        return replace(self, stages=tuple(stages))


def _cut_off(stage: Stage) -> Stage:
    return replace(stage, state="stopped") if stage.state == "running" else stage


def stages(config: Config) -> list[Stage]:
    """Return the commands of the demo, in order."""
    runs, models = str(config.runs), [str(config.runs / name) for name in MODELS]
    report = str(config.runs / "report.html")
    output = ("--output_dir", runs)
    limits = [("--data", DATA, "--limit", str(limit)) for limit in (config.limit, config.cknna_limit)]
    analyses = ("-m", "analyses.all", "--model", *models, *limits[0], *output, "--report", report)
    vfms = ("dinov2-small", "efficientnet-lite0")
    cknna = ("-m", "analyses.cknna", "--model", *models, "--vfm", *vfms, *limits[1], *output)
    pair = ("--model", *models, "--sweep", config.sweep)
    summary = ("-m", "workbench.summary", *pair, "--report", report, "--runs", runs)
    return [
        Stage("the weights of both vision foundation models", ("-m", "workbench.vfm", *vfms), needed=True),
        Stage("both trainings, side by side", ("-m", "trainer.sweep", config.sweep, "--output_dir", runs), needed=True),
        Stage(f"every analysis of both models, on {config.limit} images", analyses),
        Stage(f"CKNNA of both models with both vision foundation models, on {config.cknna_limit} images", cknna),
        Stage("the results in three sentences", summary, needed=True),
    ]


# --- processes ------------------------------------------------------------------------------------


@dataclass
class Children:
    """The processes that the demo starts and must stop."""

    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, words: Sequence[str], stdout: int | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start `python WORDS`, with `variables` in its environment."""
        process = subprocess.Popen(python(words), stdin=subprocess.DEVNULL, stdout=stdout, env=environment(**variables))
        self.running.append(process)
        return process

    def end(self) -> None:
        """Ask all processes to stop, and kill those that still run after PATIENCE seconds."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def children() -> Iterator[Children]:
    """Yield a `Children` whose processes are stopped on exit, whatever the reason.

    SIGTERM and SIGHUP raise KeyboardInterrupt like Ctrl-C, unless this process ignores them (nohup).
    """
    started = Children()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        started.end()


def serve(runs: Path, processes: Children, token: str) -> str:
    """Start the dashboard and return its address once it answers.

    Args:
        runs: the folder that it shows.
        processes: to which it belongs.
        token: with which its pages start jobs; it goes where only this user can read it, and is not in the address.

    Raises:
        RunError: the dashboard ended, or does not answer within two minutes.
    """
    port = _free_port()
    words = ["-m", "workbench.dashboard", "--port", str(port), "--runs", str(runs)]
    server = processes.start(words, stdout=subprocess.DEVNULL, STREAMLIT_LOGGER_LEVEL="warning", VIRAL_TOKEN=token)
    deadline = time.monotonic() + 120
    while True:
        with socket.socket() as connection:
            if not connection.connect_ex(("127.0.0.1", port)):
                return f"http://127.0.0.1:{port}"
        if server.poll() is not None or time.monotonic() > deadline:
            raise RunError(
                f"the dashboard does not answer on port {port}: expected an answer within two minutes; --headless runs"
                " the demo without it"
            )
        time.sleep(0.1)


def _free_port() -> int:
    for port in range(PORT, PORT + 100):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RunError(f"none of the ports {PORT} to {PORT + 99} is free: expected one for the dashboard")


def _cpu() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = os.times()
    return used.children_user + used.children_system


# --- the demo -------------------------------------------------------------------------------------


def run(config: Config, processes: Children) -> list[str]:
    """Run every stage and return the titles of those that failed.

    Raises:
        RunError: a stage failed that is `needed`.
    """
    progress = Progress(tuple(stages(config)), os.getpid())
    progress.write(config.runs)
    if not config.headless:
        token = secrets.token_urlsafe(24)
        progress = replace(progress, address=serve(config.runs, processes, token))
        _say(f"the dashboard, which updates by itself: {progress.address}/?token={token}")
    failed = []
    for number, stage in enumerate(progress.stages):
        words = list(stage.words)
        if progress.address and "workbench.summary" in words:
            words += ["--address", progress.address]
        _say(f"{stage.title}: {shlex.join(['python', *words])}")
        progress = progress.changed(number, state="running", started=now())
        progress.write(config.runs)
        began, cpu = time.monotonic(), _cpu()
        try:
            code = processes.start(words).wait()
            state: State = "failed" if code else "done"
        except BaseException:
            progress.changed(number, state="stopped").write(config.runs)
            raise
        progress = progress.changed(
            number, state=state, seconds=round(time.monotonic() - began, 1), cpu=round(_cpu() - cpu, 1)
        )
        progress.write(config.runs)
        if number < len(progress.stages) - 1:  # the summary's sentences are to be the last output
            seconds, cpu_seconds = progress.stages[number].seconds, progress.stages[number].cpu
            _say(f"{state} after {seconds:.0f} s ({cpu_seconds:.0f} s of CPU time)")
        if state == "failed":
            failed.append(stage.title)
            if stage.needed:
                raise RunError(
                    f"{stage.title}: the command above ended with code {code}: see its message; the same demo command"
                    " continues from there"
                )
    return failed


def _say(line: str) -> None:
    sys.stdout.write(f"== {line}\n")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Run the demo, then serve the dashboard until Ctrl-C."""
    config = parse(Config, argv, prog="python -m workbench.demo", description=__doc__ or "")
    read_recipe(SWEEPS.find(config.sweep), called="sweep")  # fails before anything is started
    with children() as processes:
        failed = run(config, processes)
        if not config.headless:
            _say("the dashboard runs until Ctrl-C")
            processes.running[0].wait()
    if failed:
        raise RunError(
            f"{len(failed)} of the stages failed ({'; '.join(failed)}): see their messages above; the same command"
            " tries them again"
        )


if __name__ == "__main__":
    command(main)
