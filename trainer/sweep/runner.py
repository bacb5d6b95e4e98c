"""Runs the trainings of a sweep as processes, several at a time, until all are finished or a signal stops them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

from trainer.sweep.spec import Job, Sweep, check
from workbench.processes import cores, environment, python
from workbench.training_folder import RECIPE_FILE, RECORD_FILE


@dataclass
class Running:
    """A running training, and its last lines on stderr."""

    job: Job
    process: subprocess.Popen[str]
    lines: deque[str]
    reader: Thread

    @classmethod
    def begin(cls, job: Job, threads: int) -> Running:
        """Start a training that uses `threads` threads, or resume it if there is a run in its folder."""
        resume = ["--resume"] if (job.folder / RECIPE_FILE).exists() else []
        command = python(["-m", "trainer", *job.arguments, *resume])
        variables = environment(OMP_NUM_THREADS=str(threads))
        process = subprocess.Popen(
            command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        lines: deque[str] = deque(maxlen=20)
        reader = Thread(target=cls._relay, args=(process, lines), daemon=True)
        reader.start()
        return cls(job, process, lines, reader)

    @staticmethod
    def _relay(process: subprocess.Popen[str], lines: deque[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            sys.stderr.write(line)

    def why(self) -> str:
        """Return why the training failed: its last error message, or else its exit code."""
        self.reader.join(timeout=5)
        error = next((line.strip() for line in reversed(self.lines) if line.startswith("error: ")), "")
        return error.removeprefix("error: ") or f"exit code {self.process.returncode}"


def train_all(sweep: Sweep) -> dict[str, str]:
    """Run every training that is not finished, `sweep.processes` at a time.

    Returns:
        The runs that are missing in the end, {run: reason}.

    Raises:
        KeyboardInterrupt, SystemExit: after SIGINT, or SIGTERM and SIGHUP, once the trainings have ended.
    """
    check(sweep)
    waiting = [job for job in sweep.jobs() if not job.finished]
    total, failed = len(waiting), {}
    # Results depend on the number of threads (by rounding), so every run gets the same share of the cores, even when
    # it is the last one left. Only `first` always runs alone, and gets all of them.
    first = sweep.jobs()[0].folder if sweep.first else None
    running: list[Running] = []
    with noted_signals() as caught:
        try:
            while (running or any(map(is_ready, waiting))) and not caught:
                while len(running) < sweep.processes and any(map(is_ready, waiting)):
                    ready = [is_ready(job) for job in waiting]
                    job = waiting.pop(ready.index(True))
                    threads = cores() if job.folder == first else max(1, cores() // sweep.processes)
                    running.append(Running.begin(job, threads=threads))
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    if entry.process.returncode:
                        failed[str(entry.job)] = entry.why()
                    done = total - len(waiting) - len(running) - len(failed)
                    sys.stderr.write(
                        f"sweep: {entry.job} {'failed' if str(entry.job) in failed else 'finished'}, {done} of {total}"
                        " done\n"
                    )
                time.sleep(0.2)
        finally:
            _stop(running)
    if caught:
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(128 + caught[0])
    return failed | {str(job): f"not started, since the run in {job.start} is not finished" for job in waiting}


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect the signals that ask the sweep to stop in a list, instead of interrupting it at once.

    An interrupt while a training starts would leave it running. Signals that are ignored (nohup) stay ignored.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda signum, _: caught.append(signum))
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _stop(running: list[Running]) -> None:
    """Terminate the trainings and wait for them; kill those that have not ended after 20 seconds."""
    for entry in running:
        entry.process.terminate()
    for entry in running:
        try:
            entry.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            entry.process.kill()
            entry.process.wait()


def is_ready(job: Job) -> bool:
    """Return whether a job can start: it starts from no other run, that run is finished, or a model lies elsewhere."""
    if job.start is None or (job.start / RECORD_FILE).exists():
        return True
    return job.start.parent != job.folder.parent and (job.start / "model.safetensors").exists()
