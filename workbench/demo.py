"""What `viral demo` and `make demo` do: the dashboard first, behind it a pair of trainings and every analysis of both,
and three sentences at the end.

python -m workbench.demo
python -m workbench.demo --runs runs --headless

Every stage is a command that can be given by itself, and each looks up what is there: an interrupted demo goes on where
it stopped, and a second one is quick. RUNS/demo.json says how far it is, for the dashboard's first page. Ctrl-C and
SIGTERM stop the commands and the dashboard.
"""

from __future__ import annotations

import json
import os
import resource
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
PORT = 8501  # or the next one that is free
PATIENCE = 30.0  # seconds that a command has to stop; the sweep gives its trainings 20


@dataclass(frozen=True)
class Config:
    """Where, and how much."""

    runs: Path = Path("runs")
    """The folder for models, analyses and the report."""
    headless: bool = False
    """Serve no dashboard."""
    sweep: str = "demo"
    """What trains `baseline` and `viral`: the name of a sweep in the package, or the path of a YAML file."""
    limit: int = 40
    """Images for each analysis."""
    cknna_limit: int = 100
    """Images for CKNNA with both vision networks, which takes little time for each."""


@dataclass(frozen=True)
class Stage:
    """One command, and how far it is.

    Attributes:
        words: after `python`.
        needed: nothing that follows can do without it.
        seconds, cpu: how long it took, by the clock and on all cores.
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
    """How far a demo is, as its file says.

    Attributes:
        process: of the demo; of one that is no longer there, a stage that runs was cut off.
        address: of the dashboard, "" where none is served.
    """

    stages: tuple[Stage, ...]
    process: int = 0
    address: str = ""

    @classmethod
    def read(cls, runs: Path) -> Progress | None:
        """What `runs` holds of a demo, None where there is none, or nothing that can be read."""
        try:
            content = json.loads((runs / PROGRESS_FILE).read_text())
            stages = tuple(Stage(**stage | {"words": tuple(stage["words"])}) for stage in content.pop("stages"))
            found = cls(stages, **content)
            return found if found.alive else replace(found, stages=tuple(map(_cut_off, stages)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write(self, runs: Path) -> None:
        """Replace the file as a whole."""
        with atomic_file(make_folder(runs) / PROGRESS_FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2))

    @property
    def alive(self) -> bool:
        """Whether the demo is still there."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return self.process > 0

    def changed(self, number: int, **values: Any) -> Progress:
        """With other values of one stage."""
        return replace(
            self, stages=tuple(replace(own, **values) if at == number else own for at, own in enumerate(self.stages))
        )


def _cut_off(stage: Stage) -> Stage:
    return replace(stage, state="stopped") if stage.state == "running" else stage


def stages(config: Config) -> list[Stage]:
    """The commands, in order."""
    runs, models = str(config.runs), [str(config.runs / name) for name in MODELS]
    report = str(config.runs / "report.html")
    analyses = (
        "-m",
        "analyses.all",
        "--model",
        *models,
        "--limit",
        str(config.limit),
        "--output_dir",
        runs,
        "--report",
        report,
    )
    vfms = ("dinov2-small", "efficientnet-lite0")
    cknna = (
        "-m",
        "analyses.cknna",
        "--model",
        *models,
        "--vfm",
        *vfms,
        "--data",
        "shapes:val",
        "--limit",
        str(config.cknna_limit),
        "--output_dir",
        runs,
    )
    summary = (
        "-m",
        "workbench.summary",
        "--model",
        *models,
        "--report",
        report,
        "--runs",
        runs,
        "--sweep",
        config.sweep,
    )
    return [
        Stage("the weights of both vision networks", ("-m", "workbench.vfm", *vfms), needed=True),
        Stage("both trainings, side by side", ("-m", "trainer.sweep", config.sweep, "--output_dir", runs), needed=True),
        Stage(f"every analysis of both models, on {config.limit} images", analyses),
        Stage(f"CKNNA of both with both vision networks, on {config.cknna_limit} images", cknna),
        Stage("what came out", summary, needed=True),
    ]


# --- processes ------------------------------------------------------------------------------------


@dataclass
class Children:
    """The processes of the demo, which end with it."""

    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, words: Sequence[str], stdout: int | None = None, **variables: str) -> subprocess.Popen[bytes]:
        """Start `python WORDS`, with `variables` in its environment."""
        process = subprocess.Popen(python(words), stdin=subprocess.DEVNULL, stdout=stdout, env=environment(**variables))
        self.running.append(process)
        return process

    def end(self) -> None:
        """Ask all to stop, wait, and insist."""
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
    """Processes that are stopped on the way out, whatever the reason; SIGTERM and SIGHUP are reasons like Ctrl-C,
    unless they are ignored (nohup)."""
    found = Children()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        found.end()


def serve(runs: Path, own: Children) -> str:
    """Start the dashboard and return its address once it answers.

    Raises:
        RunError: it ended, or does not answer within two minutes.
    """
    port = _free_port()
    words = ["-m", "workbench.dashboard", "--port", str(port), "--runs", str(runs)]
    server = own.start(words, stdout=subprocess.DEVNULL, STREAMLIT_LOGGER_LEVEL="warning")
    deadline = time.monotonic() + 120
    while True:
        with socket.socket() as asked:
            if not asked.connect_ex(("127.0.0.1", port)):
                return f"http://127.0.0.1:{port}"
        if server.poll() is not None or time.monotonic() > deadline:
            raise RunError(
                f"the dashboard does not answer on port {port}: expected it within two minutes; --headless does"
                " without it"
            )
        time.sleep(0.1)


def _free_port() -> int:
    for port in range(PORT, PORT + 100):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RunError(f"none of the ports {PORT} to {PORT + 99} is free: expected one for the dashboard")


def _cpu() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- the demo -------------------------------------------------------------------------------------


def run(config: Config, own: Children) -> list[str]:
    """Run every stage and return the titles of those that failed.

    Raises:
        RunError: one failed that the others need.
    """
    progress = Progress(tuple(stages(config)), os.getpid())
    progress.write(config.runs)
    if not config.headless:
        progress = replace(progress, address=serve(config.runs, own))
        _say(f"the dashboard, which fills itself: {progress.address}")
    failed = []
    for number, stage in enumerate(progress.stages):
        words = [
            *stage.words,
            *(["--address", progress.address] if progress.address and "workbench.summary" in stage.words else []),
        ]
        _say(f"{stage.title}: {shlex.join(['python', *words])}")
        progress = progress.changed(number, state="running", started=now())
        progress.write(config.runs)
        began, cpu = time.monotonic(), _cpu()
        try:
            code = own.start(words).wait()
            state: State = "failed" if code else "done"
        except BaseException:
            progress.changed(number, state="stopped").write(config.runs)
            raise
        progress = progress.changed(
            number, state=state, seconds=round(time.monotonic() - began, 1), cpu=round(_cpu() - cpu, 1)
        )
        progress.write(config.runs)
        if number < len(progress.stages) - 1:  # the last words are those of what came out
            _say(
                f"{state} after {progress.stages[number].seconds:.0f} s, {progress.stages[number].cpu:.0f} s of all"
                " cores"
            )
        if state == "failed":
            failed.append(stage.title)
            if stage.needed:
                raise RunError(
                    f"{stage.title}: the command above ended with code {code}; the same command goes on from there"
                )
    return failed


def _say(line: str) -> None:
    sys.stdout.write(f"== {line}\n")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Run the demo, and serve until Ctrl-C."""
    config = parse(Config, argv, prog="python -m workbench.demo", description=__doc__ or "")
    read_recipe(SWEEPS.find(config.sweep), called="sweep")  # before anything is started
    with children() as own:
        failed = run(config, own)
        if not config.headless:
            _say("the dashboard goes on until Ctrl-C")
            own.running[0].wait()
    if failed:
        raise RunError(
            f"{len(failed)} of the stages failed ({'; '.join(failed)}): expected none; the same command tries them"
            " again"
        )


if __name__ == "__main__":
    command(main)
