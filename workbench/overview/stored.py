"""The stored analyses of a runs folder: which of them belong together, and those that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.errors import RunError, one_line
from workbench.files import whole_parquet, whole_safetensors
from workbench.models import split_name
from workbench.records import read_run_record
from workbench.runs import RUN_FILE
from workbench.training_folder import RECORD_FILE, read_table

LEDGER = "claims"  # stored like an analysis, but of no model
TENSORS = "tensors.safetensors"
NEED_TENSORS = ("attention",)  # analyses whose measures are read from TENSORS, which their records do not list


@dataclass(frozen=True)
class StoredRun:
    """One stored analysis of one model, without its tables.

    Attributes:
        model: key of the model (`workbench.overview.models`); "" for the ledger.
        question: hash of everything that two runs must share to be compared: options and images.
        sources: whose tokens `patching` puts in, in words, () for other analyses: the key of a model, and where
            `models.with_variants` knows that it has the seed of `model`, "VARIANT of the same seed".
        retrained: the model that was trained anew after this run, "" if none was.
        changed: when its record and its folder were changed, in ns. Two runs are equal if nothing was changed.
    """

    folder: Path
    analysis: str
    model: str
    question: str
    record: Mapping[str, Any] = field(repr=False, compare=False)
    sources: tuple[str, ...] = ()
    retrained: str = ""
    changed: tuple[int, int] = (0, 0)

    @property
    def key(self) -> str:
        """The key of the run."""
        return str(self.record["key"])

    @property
    def stale(self) -> bool:
        """Whether it is of a model that is no longer there."""
        return bool(self.retrained)

    @property
    def created(self) -> str:
        """When it was stored, UTC."""
        return str(self.record.get("created", ""))

    def asked(self) -> list[StoredRun]:
        """Return the run once for each of its `sources`, whose name is then part of its question."""
        return [
            replace(self, question=f"{self.question}-{_short_hash(source)}", sources=(source,))
            for source in self.sources
        ] or [self]

    def table(self, name: str) -> pd.DataFrame:
        """Read one of its tables, an empty one if it has no such table.

        Raises:
            RunError: the table is damaged.
        """
        if name not in self.record["tables"]:
            return pd.DataFrame()
        file = self.folder / f"{name}.parquet"
        return _table(file, _changed(file)).copy(deep=False)


@lru_cache(maxsize=64)  # of an analysis with many models; its measures are asked for one after the other
def _table(file: Path, changed: int) -> pd.DataFrame:
    del changed
    return read_table(file)


@dataclass(frozen=True)
class Broken:
    """A file or folder that cannot be read, and why, in one sentence."""

    name: str
    why: str


@dataclass(frozen=True)
class Stored:
    """All stored analyses, newest first, and the broken ones."""

    runs: tuple[StoredRun, ...] = ()
    broken: tuple[Broken, ...] = ()

    def of(self, analysis: str, models: Sequence[str]) -> list[list[StoredRun]]:
        """Return the runs of an analysis of `models` that ask the same, one list for each question.

        The question that the most of `models` were asked comes first, of several the newest one. Of each model the
        newest run is taken, in the order of `models`; a stale one never. Runs of patching ask the same if their sources
        are one model, or trainings of one variant, each with the seed of the model that gets its tokens.
        """
        by_question: dict[str, dict[str, StoredRun]] = {}
        for run in self.runs:
            if run.analysis == analysis and run.model in models and not run.stale:
                for asked in run.asked():
                    by_question.setdefault(asked.question, {}).setdefault(run.model, asked)
        lists = [[of[name] for name in models if name in of] for of in by_question.values()]
        lists.sort(key=len, reverse=True)  # stable: runs are sorted by time
        folders = [{run.folder for run in runs} for runs in lists]
        return [runs for number, runs in enumerate(lists) if not any(folders[number] <= of for of in folders[:number])]


def read_stored(root: Path) -> Stored:
    """Return the analyses that are stored in a runs folder."""
    runs, broken = [], []
    for file in sorted(root.glob(f"[!.]*/{RUN_FILE}")):  # a folder whose name begins with a dot is being written
        changed = (_changed(file), _changed(file.parent))
        record = _record(file, changed)
        if isinstance(record, Broken):
            broken.append(record)
        elif record is not None:
            runs.append(_stored(root, file.parent, record, changed))
    return Stored(tuple(sorted(runs, key=lambda run: run.created, reverse=True)), tuple(broken))


@lru_cache(maxsize=4096)
def _record(file: Path, changed: tuple[int, int]) -> Mapping[str, Any] | Broken | None:
    """Read the record of a run and check its tables; `changed`: when it and its folder were changed."""
    del changed
    try:
        record: Mapping[str, Any] = read_run_record(file)
    except RunError as error:
        return Broken(file.parent.name, str(error).replace(f"{file.parent}/", "")) if file.exists() else None
    if not {"key", "tables"} <= record.keys():
        return None  # a run.json of another program
    for name in record["tables"]:
        if not whole_parquet(file.parent / f"{name}.parquet"):
            return Broken(file.parent.name, f"{name}.parquet is missing or damaged: expected a table of this run")
    tensors = file.parent / TENSORS
    if (record["analysis"] in NEED_TENSORS or tensors.exists()) and not whole_safetensors(tensors):
        return Broken(file.parent.name, f"{TENSORS} is missing or damaged: expected the tensors of this run")
    return record


def _stored(root: Path, folder: Path, record: Mapping[str, Any], changed: tuple[int, int]) -> StoredRun:
    model = _model_key(root, record)
    config = dict(record["config"])
    source = config.pop("source", "")  # of patching; a part of the question by itself
    sources = (_key_below(root, source) or source,) if source and isinstance(source, str) else ()
    question = _short_hash([record["analysis"], record.get("version"), config, record.get("data_fingerprint")])
    retrained = next((key for key in (model, *sources) if key and _trained_after(root / key, record)), "")
    return StoredRun(folder, record["analysis"], model, question, record, sources, retrained, changed)


def _short_hash(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _trained_after(folder: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a training folder was written after a run was stored."""
    trained = folder / RECORD_FILE
    return _created(trained, _changed(trained)) > str(record.get("created", ""))


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _model_key(root: Path, record: Mapping[str, Any]) -> str:
    """Return the key of the model of a run: its folder below `root` if there is one, else its label."""
    if record["analysis"] == LEDGER:
        return ""
    return _key_below(root, str(record.get("model", ""))) or str(record["label"])


def _key_below(root: Path, model: str) -> str:
    """Return the key of a model that a record names: its folder below `root`, "" if there is none.

    A runs folder may have been copied or moved, so the end of the stored path decides.
    """
    parts = Path(split_name(model)[1]).parts
    for start in range(len(parts)):
        candidate = Path(*parts[start:])
        if not candidate.is_absolute() and ".." not in candidate.parts and (root / candidate).is_dir():
            return candidate.as_posix()
    return ""


@lru_cache(maxsize=4096)
def _created(file: Path, changed: int) -> str:
    """Return when a training finished, "" if it has no readable record; `changed` is the file's time."""
    try:
        return str(json.loads(file.read_text()).get("created", "")) if changed else ""
    except (OSError, ValueError, AttributeError):
        return ""


def options_text(run: StoredRun) -> str:
    """Return the options of a run in a few words, without those that its data say."""
    config = run.record["config"]
    shown = {key: value for key, value in config.items() if key not in ("data", "limit", "seed", "data_seed", "source")}
    if run.sources:
        shown = {"source": run.sources[0]} | shown
    words = [f"{key} {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in shown.items() if v != []]
    return one_line(", ".join(words), 200)
