"""Shared fixtures: one small baseline and one small VIRAL model, trained once by the real command line on real DINOv2
features."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import shapes

shapes.install()
ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMALL = [
    "--optim.steps",
    "12",
    "--optim.batch_size",
    "4",
    "--data.limit_train",
    "24",
    "--data.limit_val",
    "8",
    "--model.layers",
    "3",
    "--model.width",
    "32",
]
SMALL += ["--model.ffn", "64", "--log_every", "2", "--eval_every", "6", "--save_every", "6"]
SMALL_VIRAL = [*SMALL, "--alignment.layer", "2", "--alignment.hidden", "16"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


# variables that libraries read when they are imported, which the server has done
AT_IMPORT = ("HF_", "OMP_", "PYTHON", "TORCH_", "TRANSFORMERS_")


class Process:
    """A command in a fork of the worker's command server (tests/command_server.py)."""

    def __init__(self, words: Sequence[str], cwd: Path, environment: Mapping[str, str | None]) -> None:
        self.words = list(words)
        self._out, self._err = (tempfile.NamedTemporaryFile("r") for _ in range(2))  # noqa: SIM115  (closed with self)
        arguments = {"words": self.words, "cwd": str(cwd), "out": self._out.name, "err": self._err.name}
        self.pid = _ask(start=arguments | {"environment": environment})
        self.returncode: int | None = None

    def poll(self, *, block: bool = False) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(wait=self.pid, block=block)
        return self.returncode

    def wait(self) -> int:
        code = self.poll(block=True)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return Path(self._out.name).read_text()

    @property
    def err(self) -> str:
        return Path(self._err.name).read_text()


@cache
def _server() -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The command server of this test worker, and its environment."""
    words = [sys.executable, "-m", "tests.command_server"]
    server = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return server, _environment()


def _ask(**request: object) -> Any:
    server, _ = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def changes(environment: Mapping[str, str]) -> dict[str, str | None]:
    """How the environment of a command differs from the server's."""
    wanted, (_, there) = _environment() | dict(environment), _server()
    removed: dict[str, str | None] = {name: None for name in there if name not in wanted}
    return removed | {name: value for name, value in wanted.items() if there.get(name) != value}


def start(*words: str, cwd: Path = ROOT, **environment: str) -> Process:
    """Start `python -m ...` without the seconds that its imports would take."""
    different = changes(environment)
    assert not any(name.startswith(AT_IMPORT) for name in different), different
    return Process(words, cwd, different)


def run(*words: str, cwd: Path = ROOT, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` as a user would; checks the exit code unless it is None.

    In a process with imports of its own where they depend on the environment, or the command is not the project's.
    """
    different = changes(environment)
    if words[0].startswith("accelerate.") or any(name.startswith(AT_IMPORT) for name in different):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False
        )
    else:
        process = Process(words, cwd, different)
        done = subprocess.CompletedProcess(process.words, process.wait(), process.out, process.err)
    assert code is None or done.returncode == code, (
        f"{words} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done


def launch(*words: str, fails: bool = False, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Do what `accelerate launch WORDS` does on one machine, with its processes as forks of the command server.

    Some commands of the documentation run the real launcher (tests/project/test_docs.py).
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words]))
    prepared = prepare_multi_gpu_env(arguments)
    # the number of threads, which the launcher sets too, is that of the server
    shared = {
        name: value
        for name, value in prepared.items()
        if os.environ.get(name) != value and not name.startswith(AT_IMPORT)
    } | environment
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    count = arguments.num_processes
    ranks = [
        start(
            arguments.training_script,
            *arguments.training_script_args,
            cwd=cwd,
            **shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    codes = [rank.wait() for rank in ranks]
    out, err = ("".join(getattr(rank, name) for rank in ranks) for name in ("out", "err"))
    assert any(codes) == fails, err
    return subprocess.CompletedProcess(list(words), max(codes), out, err)


def refused(*words: str) -> str:
    """The one sentence that `python -m ...` ends with, run in this process: each of its own would spend seconds on
    imports."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        patch.setattr(sys, "argv", list(words))
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    last = said.getvalue().strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: ") and "Traceback" not in said.getvalue(), said.getvalue()
    return last


def recipe(name: str, world: str = "shapes") -> str:
    return str(ROOT / "trainer" / "recipes" / f"{world}_{name}.yaml")


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a trained `baseline` and `viral` and a stored CKNNA run of each."""
    root = tmp_path_factory.mktemp("runs")
    first = tmp_path_factory.mktemp("first") / "stage1"
    run("trainer", recipe("stage1"), "--output_dir", str(first), *SMALL)
    run("trainer", recipe("baseline"), "--output_dir", str(root / "baseline"), "--start", str(first), *SMALL)
    run(
        "trainer",
        recipe("viral"),
        "--output_dir",
        str(root / "viral"),
        "--start",
        str(first),
        *SMALL_VIRAL,
        "--report_to",
        "tensorboard",
    )
    models = [str(root / "baseline"), str(root / "viral")]
    run(
        "analyses.cknna",
        "--model",
        *models,
        "--vfm",
        "dinov2-small",
        "--limit",
        "6",
        "--null",
        "10",
        "--output_dir",
        str(root),
    )
    return root


def pytest_collection_finish() -> None:
    """Keep what has been imported out of garbage collections, such as accelerate's after each training: a third of a
    second each."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs trained models is slow, since they are trained first."""
    for item in items:
        if "runs_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
