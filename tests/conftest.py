"""Shared fixtures: one small baseline and one small VIRAL model, trained once by the real command line on real DINOv2
features."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
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


def run(*words: str, cwd: Path = ROOT, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` as a user would; checks the exit code unless it is None."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
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
