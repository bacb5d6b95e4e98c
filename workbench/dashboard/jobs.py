"""Analyses started from the dashboard: a subprocess of the very command that the page shows, its output in a file, one
at a time for each analysis.

Jobs belong to the server, not to a browser tab, and end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import streamlit as st

from workbench.errors import RunError
from workbench.processes import environment, python

State = Literal["running", "done", "failed", "stopped"]
LOCAL = ("127.0.0.1", "localhost", "::1")
PATIENCE = 5.0  # seconds between asking a job to stop and the next, ruder, signal


@dataclass
class Job:
    """One run of a command.

    Attributes:
        words: the command as a list; no shell ever sees it.
        output: file that takes everything it prints.
    """

    words: tuple[str, ...]
    output: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False

    @property
    def state(self) -> State:
        code = self.process.poll()
        if code is None:
            return "running"
        return "stopped" if self.stopped else "done" if code == 0 else "failed"

    def lines(self) -> list[str]:
        """What it printed last; of a progress bar only its newest state."""
        with self.output.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            text = file.read().decode(errors="replace")
        return [
            shown
            for line in text.split("\n")
            if (shown := next((part.rstrip() for part in reversed(line.split("\r")) if part.strip()), ""))
        ]

    def progress(self) -> tuple[float, str] | None:
        """Share done (0..1) and words of the newest progress bar, if the last line is one."""
        lines = self.lines()
        found = re.search(r"^(.*?):?\s*(\d+)%\|.*?\| *(.*)$", lines[-1]) if lines else None
        return (min(int(found[2]), 100) / 100, f"{found[1]}: {found[3]}") if found else None

    def error(self) -> str:
        """Why it failed, in one sentence: the command's own where it gave one."""
        lines = self.lines()
        own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if own:
            return own[-1]
        return f"the command ended with code {self.process.returncode}" + (f" after: {lines[-1]}" if lines else "")

    def keys(self, analysis: str) -> list[str]:
        """Keys of the stored runs that it names in its last lines."""
        return [
            found[1]
            for line in self.lines()
            if (found := re.search(rf"/{re.escape(analysis)}-([0-9a-f]{{12}})$", line))
        ]

    def stop(self) -> None:
        """Ask it to stop as Ctrl-C does, and insist if it does not listen; returns at once."""
        self.stopped = self.process.poll() is None
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)  # the group of our own child, which leads it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
                return


@dataclass
class Jobs:
    """The newest job of each analysis."""

    newest: dict[str, Job] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, words: Sequence[str]) -> Job:
        """Run `words` (python -m analyses.NAME ...) with this server's own interpreter.

        Raises:
            RunError: a job of this analysis is running already, or no process could be started.
        """
        with self.lock:
            if name in self.newest and self.newest[name].state == "running":
                raise RunError(
                    f"a job of '{name}' is running already: expected one at a time; stop it or wait for its end"
                )
            descriptor, output = tempfile.mkstemp(prefix=f"viral-{name}-", suffix=".log")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    process = subprocess.Popen(
                        python(words[1:]),
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment(PYTHONUNBUFFERED="1"),
                        start_new_session=True,
                    )
            except (OSError, ValueError) as error:
                raise RunError(f"the job could not be started: {error}") from error
            self.newest[name] = Job(tuple(words), Path(output), process)
            return self.newest[name]

    def end_all(self) -> None:
        """Stop everything, when the server ends."""
        for job in self.newest.values():
            if job.process.poll() is None:
                job._end()
            job.output.unlink(missing_ok=True)


@st.cache_resource
def jobs() -> Jobs:
    """The jobs of this server."""
    made = Jobs()
    atexit.register(made.end_all)
    return made


def may_start() -> bool:
    """Only a dashboard that nothing but this machine can reach starts processes."""
    return st.get_option("server.address") in LOCAL
