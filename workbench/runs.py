"""Save, load and list runs of analyses.

A run is a folder with `run.json`, which records everything that its numbers depend on, tables as parquet and tensors as
safetensors. The name of the folder ends with a hash of everything that determines the numbers, so that a run that is
already stored is not computed again. A run is written under a temporary name and then renamed, so that a crash leaves
no incomplete run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.errors import RunError, one_line
from workbench.files import atomic_file, atomic_folder
from workbench.plugins import identities, installed_packages
from workbench.records import Environment, RunRecord, read_run_record, write_record

if TYPE_CHECKING:  # torch takes a second to import, and listing runs does not need it
    import plotly.graph_objects as go
    from torch import Tensor

RUN_FILE = "run.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The result of an analysis of one model, and its record.

    Attributes:
        key: hash of analysis, version, config, model fingerprint, data fingerprint and libraries.
        record: the content of run.json.
        tables: long-format data frames; every score has its n, interval and chance level beside it.
        tensors: larger arrays, if the analysis stores any.
    """

    key: str
    record: RunRecord
    tables: dict[str, pd.DataFrame]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The short name of the model that figures show."""
        return str(self.record["label"])

    @property
    def extra(self) -> Mapping[str, Any]:
        """The record with what only this analysis stores in it, such as the names of its measures."""
        return self.record

    def figures(self) -> dict[str, go.Figure]:
        """Return {title: figure} of this run alone; `workbench.compare` draws several runs together."""
        from workbench.analysis.discover import load_analysis
        from workbench.figures.template import plain_name

        analysis = load_analysis(self.record["analysis"])
        figures: dict[str, go.Figure] = analysis.figures({plain_name(self.label): self})
        return figures

    def save(self, root: str | Path) -> Path:
        """Store the run below `root` and return its folder, as `save` does."""
        return save(self, Path(root))


def after_final_norm(runs: Mapping[str, Run]) -> dict[str, bool]:
    """Return for each run whether its last layer was read after the final norm; runs from before that option were not.

    Args:
        runs: stored runs by label.
    """
    return {label: bool(run.extra.get("config", {}).get("final_norm", False)) for label, run in runs.items()}


def comparable(runs: Mapping[str, Run], options: Sequence[str]) -> dict[str, Run]:
    """Return the runs whose values of single images may be paired with those of the first run.

    They have the same options and exactly the same data. Equal names are not enough: the images of a folder may have
    been replaced since.

    Args:
        runs: stored runs by label.
        options: names of the options that the values depend on.
    """

    def same(run: Run, first: Run) -> bool:
        ours, theirs = (each.extra.get("config", {}) for each in (run, first))
        return run.extra.get("data_fingerprint") == first.extra.get("data_fingerprint") and all(
            ours.get(name) == theirs.get(name) for name in options
        )

    first = next(iter(runs.values()))
    return {label: run for label, run in runs.items() if same(run, first)}


def run_key(analysis: str, version: int, config: Mapping[str, Any], model: str, data: str) -> str:
    """Hash everything that determines a run's numbers to 12 hex digits.

    The versions of the libraries, and of the plugins that the analysis and its options name, are added here.

    Args:
        model, data: fingerprints of the model and of the data set.
    """
    from workbench.hashing import libraries

    used_plugins = identities(analysis, config)  # if there are none, they are not part of the key
    parts = [analysis, version, dict(config), model, data, libraries(), *([used_plugins] if used_plugins else [])]
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def folder_of(root: Path, analysis: str, key: str) -> Path:
    """Return the folder of a run below `root`."""
    return root / f"{analysis}-{key}"


def save(run: Run, root: Path, *, renew: bool = False) -> Path:
    """Write `run` below `root` and return its folder; if the run is already stored, the stored one stays.

    Args:
        renew: write the record again, such as its time and command, if the run is already stored.
    """
    target = folder_of(root, run.record["analysis"], run.key)
    record = run.record | {"key": run.key, "tables": sorted(run.tables)}
    if renew and target.exists():
        with atomic_file(target / RUN_FILE) as partial:
            write_record(partial, record)
        return target
    with atomic_folder(target) as partial:
        for name, table in run.tables.items():
            table.to_parquet(partial / f"{name}.parquet", index=False)
        if run.tensors:
            from safetensors.torch import save_file

            save_file(
                {name: value.contiguous() for name, value in run.tensors.items()}, partial / "tensors.safetensors"
            )
        write_record(partial / RUN_FILE, record)
    return target


def load(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: the folder is not that of a run, or one of its files is damaged.
    """
    from safetensors import SafetensorError

    try:
        record = read_run_record(folder / RUN_FILE)
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in record["tables"]}
        tensors = _tensors(folder / "tensors.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder} is not a readable run ({error}): expected the folder of a stored run") from error
    return Run(record["key"], record, tables, tensors)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    from safetensors.torch import load_file

    return load_file(path)


def index(root: Path) -> pd.DataFrame:
    """List the runs stored below `root`, one row per run, newest first; only their records are read.

    A damaged record is left out with a warning.

    Returns:
        Columns folder, analysis, label, model, data, seconds (None where they are not known), created, key, config.
    """
    names = ("analysis", "label", "model", "data", "seconds", "created", "key", "config")
    rows = []
    for path in sorted(root.glob(f"[!.]*/{RUN_FILE}")):  # a folder whose name begins with a dot is being written
        try:
            record: Mapping[str, Any] = read_run_record(path)
        except RunError as error:
            log.warning("%s, and is left out", one_line(error, 300))
            continue
        if record.keys() >= set(names) - {"seconds"}:  # otherwise it is a run.json of another program
            rows.append({"folder": path.parent, **{name: record.get(name) for name in names}})
    table = pd.DataFrame(rows, columns=["folder", *names])
    return table.sort_values("created", ascending=False, ignore_index=True)


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(argv: list[str]) -> Environment:
    """Return what a result depends on besides its config: command, commit, package versions, platform and time.

    `git` and `dirty` describe the checkout that holds this package; they are "" and False for an installed package. A
    repository around the environment or the current folder says nothing about this code and is ignored.
    """
    from workbench.hashing import LIBRARIES

    root = checkout()
    packages = (
        {name: _version(name) for name in (*LIBRARIES, "accelerate", "nnsight")}
        | {PACKAGE: _package_version(root)}
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
# the files of a checkout that can change a result
CODE = ("workbench", "analyses", "trainer", "viral_workbench.py", "app.py", "pyproject.toml")


def checkout(code: Path | None = None) -> Path | None:
    """Return the root of this project's checkout if it holds `code`, else None.

    Args:
        code: a file of the package `workbench`, by default this one. For an installed or copied package the result is
            None, whatever repository is around it.
    """
    root = (code or Path(__file__)).resolve().parent.parent
    try:
        ours = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] == PACKAGE
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return root if ours and (root / ".git").exists() else None


def file_at(root: Path, commit: str, path: str) -> str | None:
    """Return the content of a file of a repository at a commit.

    The result is None if the commit has no such file, or if there is no such commit (see `has_commit`).
    """
    return _git(root, "show", f"{commit}:{path}") or None


def has_commit(root: Path, commit: str) -> bool:
    """Return whether the repository `root` has the commit."""
    return _git(root, "cat-file", "-t", commit) == "commit"


def _package_version(root: Path | None) -> str:
    """Return the version of this package, in a checkout from pyproject.toml, since another copy may be installed."""
    if root is None:
        return _version(PACKAGE)
    return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def _version(name: str) -> str:
    """Return the version of an installed distribution, "absent" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _git(root: Path, *arguments: str) -> str:
    """Return the output of a git command in the repository `root`, "" if it fails."""
    # within a git hook, GIT_* variables point to the repository of the hook
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, env=variables)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
