"""Jobs: analyses started from the dashboard.

A job is a subprocess that runs exactly the command shown on the page, with its output in a file. Jobs that the pages
add run one after the other, so that they do not share the memory of a GPU. Jobs belong to the server, not to a browser
tab, and end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from workbench.errors import RunError
from workbench.processes import environment, python
from workbench.progress import EVENTS, read_events

State = Literal["running", "done", "failed", "stopped"]
PAUSE = 0.2  # seconds between looks whether the next job may start
PATIENCE = 5.0  # seconds until a job that was asked to stop gets the next, stronger signal


@dataclass
class Job:
    """One run of a command.

    Attributes:
        words: the command as a list of arguments; it never goes through a shell.
        output: the file with everything that it prints.
        events: the file with its events (`workbench.progress`).
        process: the subprocess.
        started: time of its start, `time.monotonic()`.
        stopped: whether the user stopped it.
    """

    words: tuple[str, ...]
    output: Path
    events: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False

    @property
    def state(self) -> State:
        """Whether it runs, or how it ended."""
        code = self.process.poll()
        if code is None:
            return "running"
        return "stopped" if self.stopped else "done" if code == 0 else "failed"

    def lines(self) -> list[str]:
        """Return the last lines of its output; of a progress bar only the newest state."""
        with self.output.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode(errors="replace")
        return [
            newest
            for line in text.split("\n")
            if (newest := next((part.rstrip() for part in reversed(line.split("\r")) if part.strip()), ""))
        ]

    def progress(self) -> tuple[float, str] | None:
        """Return the share done (0..1) of what it is doing and a text, or None before its first bar."""
        bars = self._events("progress")
        if not bars:
            return None
        done, total = bars[-1]["done"], bars[-1]["total"]
        return (
            min(done / total, 1.0) if total else 0.0
        ), f"{bars[-1]['what']}: {done}{f' of {total}' if total else ''}"

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.events) if event["event"] == name]

    def error(self) -> str:
        """Return why it failed, in one sentence: the command's own error if it printed one."""
        if errors := self._events("error"):
            return str(errors[-1]["sentence"])
        lines = self.lines()
        return f"the command ended with code {self.process.returncode}" + (f" after: {lines[-1]}" if lines else "")

    def keys(self, analysis: str) -> list[str]:
        """Return the keys of the runs of an analysis that it has stored."""
        return [event["key"] for event in self._events("run") if event["analysis"] == analysis]

    def stop(self) -> None:
        """Interrupt the job as Ctrl-C does, with stronger signals if it does not stop; return at once."""
        self.stopped = self.process.poll() is None
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)  # the process group that our child leads
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
                return


@dataclass
class Jobs:
    """The newest job of each analysis, and the commands that wait.

    Attributes:
        waiting: {analysis: command}, the next one first.
        refused: {analysis: why its waiting command could not be started}.
    """

    newest: dict[str, Job] = field(default_factory=dict)
    waiting: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _queue: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def busy(self) -> bool:
        """Return whether a job runs."""
        return any(job.state == "running" for job in list(self.newest.values()))

    def add(self, name: str, words: Sequence[str]) -> None:
        """Run `words` as `start` does, now or when all jobs before it have ended.

        Raises:
            RunError: a job of this analysis runs or waits already, or no process could be started.
        """
        with self._queue:
            self.refused.pop(name, None)
            if name in self.waiting:
                raise RunError(
                    f"a job of '{name}' waits already: expected one at a time; take it out of the queue first"
                )
            if not self.waiting and not self.busy():
                self.start(name, words)
                return
            self.waiting[name] = tuple(words)
            if len(self.waiting) == 1:
                threading.Thread(target=self._start_waiting, daemon=True).start()

    def remove(self, name: str) -> None:
        """Take the waiting command of an analysis out of the queue."""
        with self._queue:
            self.waiting.pop(name, None)

    def _start_waiting(self) -> None:
        """Start the waiting commands, each when no job runs, until none waits."""
        while True:
            with self._queue:
                if not self.waiting:
                    return
                if not self.busy():
                    name, words = next(iter(self.waiting.items()))
                    try:
                        self.start(name, words)
                    except RunError as error:
                        self.refused[name] = str(error)
                    del self.waiting[name]
                    if not self.waiting:
                        return
            time.sleep(PAUSE)

    def start(self, name: str, words: Sequence[str]) -> Job:
        """Run `words` (python -m analyses.NAME ...) with the interpreter of this server.

        Raises:
            RunError: a job of this analysis is running already, or no process could be started.
        """
        with self.lock:
            if name in self.newest and self.newest[name].state == "running":
                raise RunError(
                    f"a job of '{name}' is running already: expected one at a time; stop it or wait until it ends"
                )
            descriptor, output = tempfile.mkstemp(prefix=f"viral-{name}-", suffix=".log")
            events = Path(output).with_suffix(".jsonl")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    process = subprocess.Popen(
                        python(words[1:]),
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment(PYTHONUNBUFFERED="1", **{EVENTS: str(events)}),
                        start_new_session=True,
                    )
            except (OSError, ValueError) as error:
                raise RunError(f"the job could not be started: {error}") from error
            self.newest[name] = Job(tuple(words), Path(output), events, process)
            return self.newest[name]

    def end_all(self) -> None:
        """Stop all jobs and remove their output, when the server ends."""
        with self._queue:
            self.waiting.clear()
        for job in self.newest.values():
            if job.process.poll() is None:
                job._end()
            for file in (job.output, job.events):
                file.unlink(missing_ok=True)


@cache
def jobs() -> Jobs:
    """Return the jobs of this server."""
    server_jobs = Jobs()
    atexit.register(server_jobs.end_all)
    return server_jobs
