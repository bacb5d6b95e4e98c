"""One training run that is killed by SIGKILL and resumed until it ends."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from benchmarks.resume.compare import differences
from workbench.cli import command
from workbench.files import cache_folder
from workbench.training_folder import RECORD_FILE

ROOT = Path(__file__).parents[2]
HANGING = 120.0  # seconds after which a process that should have ended hangs
HOOK = """
import os, sys, time
def watch():
    root, signals, rank = os.environ["WATCHED"], os.environ["SIGNALS"], os.environ.get("RANK", "0")
    at = int(os.environ["KILL_AT"]) if rank == os.environ["KILL_RANK"] else -1
    stop, seen = os.environ["KILL_STOPS"] == "1", 0
    def said(name):
        with open(f"{signals}/{name}-{rank}", "w") as file:
            file.write(f"{os.getpid()} {seen}")
    def hook(event, args):
        nonlocal seen
        watched = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if event not in watched or root not in str(args[0]):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        seen += 1
        if seen == 1:
            said("began")
        if seen == at:
            said("reached")
            time.sleep(3600 if stop else 0)
    said("process")
    sys.addaudithook(hook)
    return said
"""  # in every process of a run: says when it begins, and when it comes to the moment at which it is to be killed
COMMAND = """
launcher = "accelerate.commands.launch" in sys.orig_argv and "RANK" not in os.environ
if "WATCHED" in os.environ and "trainer" in sys.orig_argv and not launcher:
    import atexit
    atexit.register(watch(), "ended")
"""


@dataclass(frozen=True)
class Setting:
    """A training run, `processes` of it side by side, by a launch file; `cold` without features at its beginning."""

    name: str
    words: Sequence[str]
    processes: int = 1
    cold: bool = False
    launch: str = "ddp"


@dataclass
class Kill:
    """Where a kill hit, and, if the others were left to themselves, the seconds until all had ended."""

    stage: str
    alone: bool = False
    ended_after: float = 0.0


# copies of a process that has imported everything and done nothing: a second of computing, not ten
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer.loop", "tests.students"])


class Copy:
    """A run in copies of a process; the command line is read as ever, but of two processes no launcher ends one when
    the other dies.

    Has of subprocess.Popen what is needed here.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], stderr: Path, processes: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        several = {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        own = [
            several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)
        ]
        self.workers = [SERVER.Process(target=work, args=(words, dict(environment) | extra, stderr)) for extra in own]
        for worker in self.workers:
            worker.start()

    @property
    def returncode(self) -> int:
        return max(abs(worker.exitcode or 0) for worker in self.workers)

    def poll(self) -> int | None:
        return None if any(worker.is_alive() for worker in self.workers) else self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        if self.poll() is None:
            raise subprocess.TimeoutExpired("trainer", timeout)
        return self.returncode


def work(words: Sequence[str], environment: Mapping[str, str], stderr: Path) -> None:
    """Be one process of a run."""
    from trainer.__main__ import main

    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for seed in (torch.seed, random.seed, np.random.seed):  # a fresh process has other random numbers, too
        seed()
    scope: dict[str, Any] = {}
    exec(HOOK, scope)
    said = scope["watch"]()
    sys.argv = ["trainer", *words]
    command(main)
    said("ended")


class Life:
    """One output folder, from its beginning to its end, through as many kills as come.

    Args:
        folder: holds `out`, and `cache` where the features are the run's own.
        hooks: a folder for PYTHONPATH that has a process watched; None for copies of a process.
    """

    def __init__(self, setting: Setting, folder: Path, hooks: Path | None) -> None:
        self.setting, self.folder, self.forked = setting, folder, hooks is None
        self.out, self.signals = folder / "out", folder.with_name(f"{folder.name}-signals")
        folder.mkdir()
        self.environment = os.environ | {"PYTHONPATH": str(hooks), "WATCHED": str(folder), "SIGNALS": str(self.signals)}
        if setting.cold:
            (folder / "cache").mkdir()
            for part in cache_folder("weights").parent.iterdir():
                if part.name != "features":
                    (folder / "cache" / part.name).symlink_to(part)
            self.environment["VIRAL_CACHE"] = str(folder / "cache")

    def start(self, *, resume: bool, kill_at: int = -1, kill_rank: int = 0, stops: bool = False) -> None:
        """Start the command as a user would, watched."""
        shutil.rmtree(self.signals, ignore_errors=True)
        self.signals.mkdir()
        python = [sys.executable, "-m"]
        launch = [
            "accelerate.commands.launch",
            "--config_file",
            f"trainer/launch/{self.setting.launch}.yaml",
            "--main_process_port",
            "0",
            "-m",
        ]
        words = [
            *python,
            *(launch if self.setting.processes > 1 else []),
            "trainer",
            *self.setting.words,
            "--output_dir",
            str(self.out),
        ]
        self.environment |= {"KILL_AT": str(kill_at), "KILL_RANK": str(kill_rank), "KILL_STOPS": str(int(stops))}
        words += ["--resume"] if resume else []
        self.started, self.resumed = time.time(), resume
        own = words[words.index("trainer") + 1 :]
        if self.forked:
            self.process: subprocess.Popen[bytes] | Copy = Copy(
                own, self.environment, self.signals / "stderr", self.setting.processes
            )
            return
        with (self.signals / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )

    def wait(self, seconds: float = 600.0) -> int | None:
        """The exit code, or None for a run that hangs and is ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill(None)
            return None

    def stderr(self) -> str:
        return (self.signals / "stderr").read_text()

    def signalled(self, name: str, rank: int = 0) -> tuple[int, int] | None:
        """(process id, things done to the disk) that a process left at a moment of its life."""
        file = self.signals / f"{name}-{rank}"
        words = file.read_text().split() if file.exists() else []
        return (int(words[0]), int(words[1])) if len(words) == 2 else None

    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self, rank: int | None) -> bool:
        """SIGKILL to every process of the run, or to one; whether one was there to kill."""
        victims: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            if rank is None and isinstance(self.process, Copy):
                victims = [psutil.Process(worker.pid) for worker in self.process.workers if worker.is_alive()]
            elif rank is None:
                own = psutil.Process(self.process.pid)
                victims = [own, *own.children(recursive=True)]
            elif signalled := self.signalled("process", rank):
                victims = [psutil.Process(signalled[0])]
        if self.ended() or not victims:
            return False
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        if rank is None:
            self.process.wait()
            psutil.wait_procs(victims, timeout=10)
        return True

    def stage(self) -> str:
        """What the run was at when it was killed, from what is on the disk."""
        stage = self.folder / "stage1-s0"
        if (stage / "recipe.yaml").exists() and not (stage / RECORD_FILE).exists():
            return "first stage"
        own = [p for p in self.out.glob("recipe.yaml") if p.stat().st_mtime >= self.started]
        if not own:
            shards = list((self.folder / "cache").glob("features/*/*.safetensors"))
            begun = [p for p in (self.folder / "cache").glob("features/*") if p.stat().st_mtime >= self.started]
            if self.setting.cold and (begun or shards) and not self.resumed:
                return "features"
            return "start-up" if self.signalled("began") is None else "preparing"
        if list(self.out.glob(".unfinished/*")):
            return "checkpoint"
        if list(self.out.glob(".final.*")) or (self.out / "final").exists():
            return "final model"
        if (self.out / "model.safetensors").exists():
            return "tables, card, record"
        log = self.out / "training.parquet"
        if not log.exists() or log.stat().st_mtime < self.started:
            return "before a step"
        rows = pd.read_parquet(log)
        step = int(rows["step"].max())
        known = rows[rows["step"] == step].filter(regex="accuracy/mean|val_lm_loss").notna().to_numpy().any()
        return "evaluation" if step % 3 == 0 and not known else "steps"


def live(
    setting: Setting, whole: Reference, folder: Path, hooks: Path | None, dice: random.Random, kills: int
) -> tuple[list[Kill], list[str]]:
    """One life with at most so many kills; returns them, and what differs from the uninterrupted run in the end."""
    hits: list[Kill] = []
    life = Life(setting, folder, hooks)
    resume = False
    while True:
        last = len(hits) >= kills
        hit = None if last else attempt(life, whole, dice, resume)
        if last:
            life.start(resume=resume)
            life.wait()
        if hit is not None:
            hits.append(hit)
            if hit.ended_after >= HANGING:
                return hits, [f"{setting.name}: the other processes hang after a kill in {hit.stage}"]
        elif life.process.returncode != 0 and resume and "start it without --resume" in life.stderr():
            resume = False
            continue
        elif life.process.returncode != 0:
            return hits, [f"{setting.name}: {life.process.returncode}, {told(life.stderr())}"]
        if (life.out / RECORD_FILE).exists():
            return hits, [
                f"{setting.name}, killed in {', '.join(h.stage for h in hits)}: {why}"
                for why in differences(whole.folder, folder)
            ]
        resume = True


def told(stderr: str) -> str:
    """The line that says most."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.match(r"error: |\w*Error", line)),
        lines[-1] if lines else "nothing on stderr",
    )


def attempt(life: Life, whole: Reference, dice: random.Random, resume: bool) -> Kill | None:
    """Start or resume the run and kill it at a random moment; None if it ended before."""
    count = life.setting.processes
    rank = dice.randrange(count)
    alone = count > 1 and dice.random() < 0.4
    by_clock, stops, moment = dice.random() < 0.5, dice.random() < 0.5, dice.random()
    if by_clock:
        life.start(resume=resume)
        if dice.random() < 0.2:
            deadline = time.monotonic() + moment * whole.start_up
            while time.monotonic() < deadline and not life.ended():
                time.sleep(0.005)
        else:
            while life.signalled("began") is None and not life.ended():
                time.sleep(0.005)
            deadline = time.monotonic() + moment * whole.span
            while time.monotonic() < deadline and not life.ended():
                time.sleep(0.002)
    else:
        life.start(resume=resume, kill_at=1 + int(moment * whole.events[rank]), kill_rank=rank, stops=stops)
        while life.signalled("reached", rank) is None and not life.ended():
            time.sleep(0.002)
    if not life.kill(rank if alone else None):
        life.wait()
        return None
    hit = Kill(life.stage(), alone)
    if alone:
        before = time.monotonic()
        code = life.wait(HANGING)
        hit.ended_after = HANGING if code is None else time.monotonic() - before
    return hit


@dataclass
class Reference:
    """The uninterrupted run: what holds its folder, seconds before the first file and after it, and how often each
    process changes something on the disk."""

    folder: Path
    start_up: float
    span: float
    events: list[int]


def reference(setting: Setting, folder: Path, hooks: Path | None) -> Reference:
    """Train without interruption."""
    life = Life(setting, folder, hooks)
    life.start(resume=False)
    if life.wait() != 0:
        raise SystemExit(f"{setting.name} fails without any kill: {told(life.stderr())}")
    begun = (life.signals / "began-0").stat().st_mtime
    events = [signalled[1] for rank in range(setting.processes) if (signalled := life.signalled("ended", rank))]
    return Reference(folder, begun - life.started, time.time() - begun, events)
