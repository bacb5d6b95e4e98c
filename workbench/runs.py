"""Stored runs: one folder each, `run.json` with everything the numbers depend on, tables as parquet, tensors as
safetensors.

A run is keyed by what determines its numbers, so the same question is a look-up. It is written under a temporary name
and renamed: a crash leaves no half run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.errors import RunError
from workbench.files import atomic_folder
from workbench.plugins import identities, installed_packages

if TYPE_CHECKING:  # torch takes a second to import, and listing runs does not need it
    import plotly.graph_objects as go
    from torch import Tensor

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Run:
    """A result and its record.

    Attributes:
        key: hash of analysis, version, config, model fingerprint, data fingerprint and libraries.
        record: the content of run.json.
        tables: long-format data frames; every score in them carries its n, interval and chance level.
        tensors: larger arrays, where an analysis keeps any.
    """

    key: str
    record: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short name of the model, as figures show it."""
        return str(self.record["label"])

    def figures(self) -> dict[str, go.Figure]:
        """{title: figure} of this run alone; `workbench.compare` draws several together."""
        from workbench.analysis.discover import load_analysis

        drawn: dict[str, go.Figure] = load_analysis(self.record["analysis"]).figures({self.label: self})
        return drawn

    def save(self, root: str | Path) -> Path:
        """Store it below `root` and return its folder; see `save`."""
        return save(self, Path(root))


def run_key(analysis: str, version: int, config: Mapping[str, Any], model: str, data: str) -> str:
    """Hash of all that determines a run's numbers, 12 hex digits; `model` and `data` are fingerprints.

    The releases of libraries enter by themselves, and so do the plugins that the analysis and its options name.
    """
    from workbench.hashing import libraries

    used = identities(analysis, config)  # {} for most runs, whose keys know of no plugins
    parts = [analysis, version, dict(config), model, data, libraries(), *([used] if used else [])]
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def folder_of(root: Path, analysis: str, key: str) -> Path:
    """Where a run lies."""
    return root / f"{analysis}-{key}"


def save(run: Run, root: Path) -> Path:
    """Write `run` below `root` and return its folder; an identical run that is already there is kept."""
    target = folder_of(root, run.record["analysis"], run.key)
    with atomic_folder(target) as partial:
        for name, table in run.tables.items():
            table.to_parquet(partial / f"{name}.parquet", index=False)
        if run.tensors:
            from safetensors.torch import save_file

            save_file(
                {name: value.contiguous() for name, value in run.tensors.items()}, partial / "tensors.safetensors"
            )
        record = run.record | {"key": run.key, "tables": sorted(run.tables)}
        (partial / RUN_FILE).write_text(json.dumps(record, indent=2, default=str))
    return target


def load(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: not a run folder, or a file of it is damaged.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text())
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in record["tables"]}
        tensors = _tensors(folder / "tensors.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{folder} is not a readable run ({error})") from error
    return Run(record["key"], record, tables, tensors)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    from safetensors.torch import load_file

    return load_file(path)


def index(root: Path) -> pd.DataFrame:
    """One row per stored run below `root`, newest first, from the records alone: no table is read.

    Columns: folder, analysis, label, model, data, seconds, created, key, config.
    """
    rows = []
    for path in sorted(root.glob(f"[!.]*/{RUN_FILE}")):  # one that begins with a dot is being written
        try:
            record = json.loads(path.read_text())
            names = ("analysis", "label", "model", "data", "seconds", "created", "key", "config")
            rows.append({"folder": path.parent, **{name: record[name] for name in names}})
        except (OSError, ValueError, KeyError):
            continue  # someone else's run.json
    table = pd.DataFrame(
        rows, columns=["folder", "analysis", "label", "model", "data", "seconds", "created", "key", "config"]
    )
    return table.sort_values("created", ascending=False, ignore_index=True)


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(argv: list[str]) -> dict[str, object]:
    """What a result depends on besides its config: command, commit of this package, package versions, platform, time.

    `git` and `dirty` are of the checkout that this package lies in, "" and False where it is installed elsewhere: the
    repository around an environment, or the one that the command is called in, says nothing about this code.
    """
    from workbench.hashing import LIBRARIES

    root = checkout()
    packages = (
        {name: _version(name) for name in (*LIBRARIES, "accelerate", "nnsight")}
        | {PACKAGE: _own_version(root)}
        | installed_packages()
    )
    return {
        "argv": argv,
        "git": "" if root is None else _git(root, "rev-parse", "HEAD"),
        "dirty": root is not None and bool(_git(root, "status", "--porcelain", "--", *CODE)),
        "packages": packages,
        "platform": platform.platform(),
        "created": now(),
    }


PACKAGE = "viral-workbench"
# what a checkout holds that changes a number
CODE = ("workbench", "analyses", "trainer", "viral_workbench.py", "app.py", "pyproject.toml")


def checkout(code: Path | None = None) -> Path | None:
    """The root of this project's repository if `code` (this package) lies in it, None for an installed or copied
    package, whatever repository is around it."""
    root = (code or Path(__file__)).resolve().parent.parent
    try:
        ours = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] == PACKAGE
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return root if ours and (root / ".git").exists() else None


def file_at(root: Path, commit: str, path: str) -> str | None:
    """A file of a repository as it was at a commit; None where the commit has none, or is not there (see
    `has_commit`)."""
    return _git(root, "show", f"{commit}:{path}") or None


def has_commit(root: Path, commit: str) -> bool:
    """Whether a commit is in the repository, of this machine."""
    return _git(root, "cat-file", "-t", commit) == "commit"


def _own_version(root: Path | None) -> str:
    """This package's version: in a checkout its own file says so, since another copy may be what is installed."""
    return (
        _version(PACKAGE)
        if root is None
        else str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _git(root: Path, *arguments: str) -> str:
    # a hook of git's names its own repository there
    elsewhere = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, env=elsewhere)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
