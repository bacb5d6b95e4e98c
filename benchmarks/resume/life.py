"""A training run that is killed by SIGKILL and resumed until it ends."""

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
HANGING = 120.0  # a process that should have ended counts as hanging after this many seconds
HOOK = """
import os, sys, time
def watch():
    root, signals, rank = os.environ["WATCHED"], os.environ["SIGNALS"], os.environ.get("RANK", "0")
    at = int(os.environ["KILL_AT"]) if rank == os.environ["KILL_RANK"] else -1
    stop, seen = os.environ["KILL_STOPS"] == "1", 0
    def signal(name):
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
            signal("began")
        if seen == at:
            signal("reached")
            time.sleep(3600 if stop else 0)
    signal("process")
    sys.addaudithook(hook)
    return signal
"""  # runs in every process of a run; writes a file when the process first writes, and when it reaches its kill
COMMAND = """
launcher = "accelerate.commands.launch" in sys.orig_argv and "RANK" not in os.environ
if "WATCHED" in os.environ and "trainer" in sys.orig_argv and not launcher:
    import atexit
    atexit.register(watch(), "ended")
"""


@dataclass(frozen=True)
class Setting:
    """A training run.

    Attributes:
        words: arguments of `python -m trainer`.
        processes: number of ranks.
        cold: start without cached features.
        launch: name of the launch file for several ranks.
    """

    name: str
    words: Sequence[str]
    processes: int = 1
    cold: bool = False
    launch: str = "ddp"


@dataclass
class Kill:
    """A kill of one rank or of all.

    Attributes:
        stage: what the run was doing.
        alone: only one of several ranks was killed.
        ended_after: with `alone`, the seconds until all other ranks had ended.
    """

    stage: str
    alone: bool = False
    ended_after: float = 0.0


# forks of a process that has imported everything; they start in one second instead of ten
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer.loop", "tests.students"])


class Copy:
    """A run in forked processes, with the part of the interface of subprocess.Popen that is used here.

    The command line is parsed as usual, but there is no launcher that ends one process when the other dies.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], stderr: Path, processes: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        by_rank = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        extras = by_rank if processes > 1 else [{}]
        self.workers = [SERVER.Process(target=work, args=(words, dict(environment) | more, stderr)) for more in extras]
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
    """Run one rank in this process."""
    from trainer.__main__ import main

    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for seed in (torch.seed, random.seed, np.random.seed):  # a fresh process starts with other random numbers, too
        seed()
    scope: dict[str, Any] = {}
    exec(HOOK, scope)
    signal_moment = scope["watch"]()
    sys.argv = ["trainer", *words]
    command(main)
    signal_moment("ended")


class Life:
    """A run and its output folder from the start to the end, through any number of kills.

    Args:
        folder: holds `out`, and `cache` if the setting is cold.
        hooks: a folder for PYTHONPATH whose code watches each process; None for forked runs.
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
        """Start the command as a user would, with its processes watched."""
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
        arguments = words[words.index("trainer") + 1 :]
        if self.forked:
            self.process: subprocess.Popen[bytes] | Copy = Copy(
                arguments, self.environment, self.signals / "stderr", self.setting.processes
            )
            return
        with (self.signals / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )

    def wait(self, seconds: float = 600.0) -> int | None:
        """Return the exit code, or None after killing a run that hangs."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill(None)
            return None

    def stderr(self) -> str:
        return (self.signals / "stderr").read_text()

    def signalled(self, name: str, rank: int = 0) -> tuple[int, int] | None:
        """Return (process id, changes on the disk so far) that a rank wrote at a named moment, or None."""
        file = self.signals / f"{name}-{rank}"
        words = file.read_text().split() if file.exists() else []
        return (int(words[0]), int(words[1])) if len(words) == 2 else None

    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self, rank: int | None) -> bool:
        """Send SIGKILL to one rank or to all processes; return whether there was one to kill."""
        victims: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            if rank is None and isinstance(self.process, Copy):
                victims = [psutil.Process(worker.pid) for worker in self.process.workers if worker.is_alive()]
            elif rank is None:
                parent = psutil.Process(self.process.pid)
                victims = [parent, *parent.children(recursive=True)]
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
        """Return what the run was doing when it was killed, judged by what is on the disk."""
        stage = self.folder / "stage1-s0"
        if (stage / "recipe.yaml").exists() and not (stage / RECORD_FILE).exists():
            return "first stage"
        if not [p for p in self.out.glob("recipe.yaml") if p.stat().st_mtime >= self.started]:
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
    setting: Setting, whole: Reference, folder: Path, hooks: Path | None, rng: random.Random, kills: int
) -> tuple[list[Kill], list[str]]:
    """Run one life with at most `kills` kills.

    Returns:
        The kills, and what differs from the uninterrupted run at the end.
    """
    hits: list[Kill] = []
    life = Life(setting, folder, hooks)
    resume = False
    while True:
        last = len(hits) >= kills
        hit = None if last else attempt(life, whole, rng, resume)
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
            return hits, [f"{setting.name}: {life.process.returncode}, {error_line(life.stderr())}"]
        if (life.out / RECORD_FILE).exists():
            return hits, [
                f"{setting.name}, killed in {', '.join(h.stage for h in hits)}: {why}"
                for why in differences(whole.folder, folder)
            ]
        resume = True


def error_line(stderr: str) -> str:
    """Return the most informative line: the last error, or else the last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.match(r"error: |\w*Error", line)),
        lines[-1] if lines else "nothing on stderr",
    )


def attempt(life: Life, whole: Reference, rng: random.Random, resume: bool) -> Kill | None:
    """Start or resume the run and kill it at a random moment; return None if it ended before."""
    count = life.setting.processes
    rank = rng.randrange(count)
    alone = count > 1 and rng.random() < 0.4
    by_clock, stops, moment = rng.random() < 0.5, rng.random() < 0.5, rng.random()
    if by_clock:
        life.start(resume=resume)
        if rng.random() < 0.2:
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
    """The uninterrupted run.

    Attributes:
        folder: contains its output folder.
        start_up: seconds until the first file is written.
        span: seconds from the first file to the end.
        events: number of changes on the disk, by rank.
    """

    folder: Path
    start_up: float
    span: float
    events: list[int]


def reference(setting: Setting, folder: Path, hooks: Path | None) -> Reference:
    """Train a setting without interruption."""
    life = Life(setting, folder, hooks)
    life.start(resume=False)
    if life.wait() != 0:
        raise SystemExit(f"{setting.name} fails even without a kill: {error_line(life.stderr())}")
    begun = (life.signals / "began-0").stat().st_mtime
    events = [signalled[1] for rank in range(setting.processes) if (signalled := life.signalled("ended", rank))]
    return Reference(folder, begun - life.started, time.time() - begun, events)
