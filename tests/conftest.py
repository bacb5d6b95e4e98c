"""Shared fixtures: one small baseline and one small VIRAL model, trained once by the real command line on real DINOv2
features."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

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


class Commands:
    """The process that runs the commands of a test worker; see tests/command_server.py."""

    def __init__(self) -> None:
        self.environment = _environment()
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @classmethod
    @cache
    def of_worker(cls) -> Commands:
        return cls()

    def run(self, words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            request = {"words": words, "cwd": str(cwd), "out": out.name, "err": err.name}
            print(json.dumps(request), file=self.server.stdin, flush=True)
            code = json.loads(self.server.stdout.readline())
            return subprocess.CompletedProcess(list(words), code, out.read(), err.read())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def run(*words: str, cwd: Path = ROOT, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` as a user would; checks the exit code unless it is None.

    In a process of its own where the environment differs from the worker's, or the command is not the project's.
    """
    if environment or words[0].startswith("accelerate.") or _environment() != Commands.of_worker().environment:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=os.environ | environment,
            check=False,
        )
    else:
        done = Commands.of_worker().run(words, cwd)
    assert code is None or done.returncode == code, (
        f"{words} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs trained models is slow, since they are trained first."""
    for item in items:
        if "runs_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
