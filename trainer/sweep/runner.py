"""The trainings of a sweep, several at a time, until all are there or a signal ends them."""

from __future__ import annotations

import os
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
from workbench.processes import environment, python
from workbench.training_folder import RECIPE_FILE, RECORD_FILE


@dataclass
class Running:
    """A training that is under way, and its last lines on stderr."""

    job: Job
    process: subprocess.Popen[str]
    lines: deque[str]
    reader: Thread

    @classmethod
    def begin(cls, job: Job, threads: int) -> Running:
        resume = ["--resume"] if (job.folder / RECIPE_FILE).exists() else []
        words = python(["-m", "trainer", *job.arguments, *resume])
        variables = environment(OMP_NUM_THREADS=str(threads))
        process = subprocess.Popen(
            words, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
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
        """Why it ended: its last error, or its exit code."""
        self.reader.join(timeout=5)
        last = next((line.strip() for line in reversed(self.lines) if line.startswith("error: ")), "")
        return last.removeprefix("error: ") or f"exit code {self.process.returncode}"


def train_all(sweep: Sweep) -> dict[str, str]:
    """Run every training that is not finished, `processes` at a time, and return why some are not there: {run: reason}.

    Raises:
        KeyboardInterrupt, SystemExit: after SIGINT, or SIGTERM and SIGHUP, once the trainings have ended.
    """
    check(sweep)
    waiting = [job for job in sweep.jobs() if not job.finished]
    total, failed = len(waiting), {}
    # shared alike whatever else is left to run, since other threads round otherwise; only `first` is always alone
    cores = os.cpu_count() or 1
    first = sweep.jobs()[0].folder if sweep.first else None
    running: list[Running] = []
    with noted_signals() as caught:
        try:
            while (running or any(map(_ready, waiting))) and not caught:
                while len(running) < sweep.processes and any(map(_ready, waiting)):
                    ready = [_ready(job) for job in waiting]
                    job = waiting.pop(ready.index(True))
                    running.append(
                        Running.begin(job, threads=cores if job.folder == first else max(1, cores // sweep.processes))
                    )
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
    return failed | {str(job): f"not started, since the run in {job.start} is not there" for job in waiting}


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """What asks the sweep to stop is only noted, so that no training begins unseen; a signal that is ignored (nohup)
    stays so."""
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
    """End the trainings and wait for them; one that does not listen is killed."""
    for entry in running:
        entry.process.terminate()
    for entry in running:
        try:
            entry.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            entry.process.kill()
            entry.process.wait()


def _ready(job: Job) -> bool:
    """Whether the folder that a run starts from, if any, is finished."""
    return job.start is None or str(job.start) == "None" or (job.start / RECORD_FILE).exists()
