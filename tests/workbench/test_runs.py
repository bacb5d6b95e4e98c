"""Provenance: a record names this package's commit, never that of a repository that happens to be around it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import ROOT
from workbench.runs import Run, checkout, comparable, environment, index, load, save


def git(*words: str, cwd: Path) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *identity, *words], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


def _repository(folder: Path) -> str:
    """Make `folder` a repository with one commit, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    git("init", "-q", cwd=folder)
    (folder / "a.txt").write_text("a")
    git("add", "a.txt", cwd=folder)
    git("commit", "-qm", "one", cwd=folder)
    return git("rev-parse", "HEAD", cwd=folder)


def _copy(root: Path) -> None:
    shutil.copytree(ROOT / "workbench", root / "workbench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "viral_workbench.py", root)


def _package(root: Path, name: str = "viral-workbench") -> Path:
    """A copy of the package in `root`, in a checkout's layout."""
    _copy(root)
    (root / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text().replace('name = "viral-workbench"', f'name = "{name}"')
    )
    return root


def recorded(root: Path, cwd: Path, **variables: str) -> tuple[str, bool]:
    """The commit and the flag that the package in `root` records when it is called in `cwd`."""
    code = "from workbench.runs import environment; own = environment([]); print(own['git'], own['dirty'])"
    words = [sys.executable, "-c", code]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    commit, _, dirty = subprocess.run(
        words, cwd=cwd, env=env, capture_output=True, text=True, check=True
    ).stdout.rpartition(" ")
    return commit.strip(), dirty.strip() == "True"


@pytest.mark.slow
def test_the_commit_is_the_checkouts_wherever_one_stands(tmp_path: Path) -> None:
    root = tmp_path / "ours"
    _repository(root)
    _package(root)
    git("add", ".", cwd=root)
    git("commit", "-qm", "two", cwd=root)
    own = git("rev-parse", "HEAD", cwd=root)
    other = _repository(tmp_path / "mine")
    assert own != other
    assert recorded(root, tmp_path / "mine") == (own, False) == recorded(root, root)
    assert recorded(root, root, GIT_DIR=str(tmp_path / "mine" / ".git"), GIT_WORK_TREE=str(tmp_path / "mine")) == (
        own,
        False,
    )
    (root / "runs").mkdir()
    (root / "runs" / "result.json").write_text("{}")
    assert recorded(root, root) == (own, False)  # what a run writes is no change of the code
    (root / "workbench" / "runs.py").write_text((root / "workbench" / "runs.py").read_text() + "\n# changed\n")
    assert recorded(root, tmp_path) == (own, True)


@pytest.mark.slow
def test_an_installed_package_has_no_commit(tmp_path: Path) -> None:
    """An environment or a copy inside another repository, and another project of the same layout."""
    _repository(tmp_path / "mine")
    site = tmp_path / "mine" / ".venv" / "lib" / "site-packages"
    _copy(site)
    assert recorded(site, tmp_path / "mine") == ("", False)
    assert recorded(_package(tmp_path / "mine" / "vendored"), tmp_path / "mine") == ("", False)
    fork = tmp_path / "fork"
    _repository(fork)
    assert recorded(_package(fork, name="something-else"), fork) == ("", False)


def test_a_record_has_this_packages_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    own = environment(["a"])
    packages = own["packages"]
    assert isinstance(packages, dict)
    assert packages["viral-workbench"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {"torch", "transformers", "tokenizers", "timm", "pillow", "numpy"} <= packages.keys()
    assert own["argv"] == ["a"]
    assert checkout() == ROOT if (ROOT / ".git").exists() else checkout() is None


def test_runs_are_paired_if_their_images_and_options_are_the_same() -> None:
    """Equal names are not enough: the photographs of a folder may have been replaced between two runs."""
    config = {"data": "shapes:val", "data_seed": 0, "limit": 9, "sink": 3.0}

    def stored(label: str, fingerprint: str = "nine", **options: Any) -> Run:
        record: Any = {"label": label, "data_fingerprint": fingerprint, "config": config | options}
        return Run(label, record, {})

    runs = {
        run.label: run
        for run in (
            stored("first"),
            stored("alike", limit=20, null=10),
            stored("replaced", "nine other images"),
            stored("renamed", data="copy:val"),
            stored("others", "nine others", data_seed=1),
            stored("sink", sink=5.0),
            stored("norm", final_norm=True),
        )
    }
    assert list(comparable(runs, ("sink", "final_norm"))) == ["first", "alike", "renamed"]
    assert list(comparable(runs, ("sink",))) == ["first", "alike", "renamed", "norm"]


@pytest.mark.parametrize(("analysis", "option"), [("tokens", "sink"), ("linear_probe", "l2"), ("logit_lens", "cover")])
def test_differences_are_of_models_that_were_measured_alike(analysis: str, option: str) -> None:
    differences = importlib.import_module(f"analyses.{analysis}.drawing").differences
    names = {"source": "model", "target": "class", "kind": "class", "cells": "object", "measure": "first", "layer": 1}

    def stored(label: str, gain: float, **options: float) -> Run:
        values = pd.DataFrame(names | {"image_id": ["i0", "i1", "i2"], "value": [0.1 + gain, 0.5, 0.6]})
        record: Any = {"label": label, "seed": 0, "data_fingerprint": "d", "config": {option: 0.5} | options}
        return Run(label, record, {"per_image": values})

    runs = {run.label: run for run in (stored("a", 0), stored("b", 0.3), stored("c", 0.6, **{option: 0.7}))}
    table = differences(runs)
    assert table["model"].tolist() == ["b"]
    assert table["score"].tolist() == pytest.approx([0.1])


def test_a_damaged_record_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record: Any = {"analysis": "cknna", "label": "a", "model": "a", "data": "d", "seconds": 1.0}
    record |= {"created": "2026-11-28T00:00:00+00:00", "config": {}}
    whole = save(Run("0" * 12, record, {"scores": pd.DataFrame({"score": [1.0]})}), tmp_path)
    damaged = save(Run("1" * 12, record, {}), tmp_path)
    (damaged / "run.json").write_text((damaged / "run.json").read_text()[:40])
    assert index(tmp_path)["folder"].tolist() == [whole]
    assert load(whole).tables["scores"]["score"].item() == 1.0
    (warning,) = caplog.messages
    assert f"{damaged / 'run.json'} is damaged" in warning
    assert warning.endswith("and is left out")
