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
from workbench.files import leads_outside, parquet_columns, whole_safetensors
from workbench.records import read_run_record
from workbench.runs import RUN_FILE
from workbench.training_folder import RECORD_FILE, read_table, trained_at

NOT_FOLLOWED = "is a link, which is not followed: expected the folder or file itself"
LEDGER = "claims"  # stored like an analysis, but of no model
TENSORS = "tensors.safetensors"
NEED_TENSORS = ("attention",)  # analyses whose measures are read from TENSORS, which their records do not list

SCORES_NEED = {
    "cknna": ("layer", "null_mean"),
    "heads": ("vfm", "layer", "chance", "n"),
    "knockout": ("accuracy_drop",),
    "linear_probe": ("layer",),
    "logit_lens": ("layer", "null_mean"),
    "patching": ("accuracy_drop",),
    "permutation": ("accuracy_drop",),
    "tokens": ("layer",),
}
"""Columns of the table `scores` without which its measures cannot be read, by analysis."""


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
    def stamp(self) -> tuple[object, ...]:
        """What changes when it is stored anew, or counts for another model, another question or no longer."""
        return str(self.folder), self.model, self.question, self.sources, self.changed, self.retrained

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

    @property
    def ledger(self) -> Path | None:
        """The folder of the newest claims ledger; None if there is none."""
        return next((run.folder for run in self.runs if run.analysis == LEDGER), None)

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
    """Return the analyses that are stored in a runs folder; what is a link out of it is not read, but named."""
    readable, broken = [], []
    for file in sorted(root.glob(f"[!.]*/{RUN_FILE}")):  # a folder whose name begins with a dot is being written
        changed = (_changed(file), _changed(file.parent))
        if leads_outside(file.parent, root):
            record: Mapping[str, Any] | Broken | None = Broken(file.parent.name, NOT_FOLLOWED)
        elif leads_outside(file, root):
            record = Broken(file.parent.name, f"{file.name} {NOT_FOLLOWED}")
        else:
            record = _record(root, file, changed)
        if isinstance(record, Broken):
            broken.append(record)
        elif record is not None:
            readable.append((file.parent, record, changed))
    keys = _model_keys(root, [record for _, record, _ in readable])
    runs = [
        _stored(root, folder, model, record, changed)
        for (folder, record, changed), model in zip(readable, keys, strict=True)
    ]
    return Stored(tuple(sorted(runs, key=lambda run: run.created, reverse=True)), tuple(broken))


@lru_cache(maxsize=4096)
def _record(root: Path, file: Path, changed: tuple[int, int]) -> Mapping[str, Any] | Broken | None:
    """Read the record of a run and check its tables; `changed`: when it and its folder were changed."""
    del changed
    try:
        record: Mapping[str, Any] = read_run_record(file)
    except RunError as error:
        return Broken(file.parent.name, str(error).replace(f"{file.parent}/", "")) if file.exists() else None
    if not {"key", "tables"} <= record.keys():
        return None  # a run.json of another program
    for name in (*(f"{table}.parquet" for table in record["tables"]), TENSORS):
        if leads_outside(file.parent / name, root):
            return Broken(file.parent.name, f"{name} {NOT_FOLLOWED}")
    for name in record["tables"]:
        columns = parquet_columns(file.parent / f"{name}.parquet")
        if columns is None:
            return Broken(file.parent.name, f"{name}.parquet is missing or damaged: expected a table of this run")
        needed = SCORES_NEED.get(record["analysis"], ()) if name == "scores" else ()
        if missing := [column for column in needed if column not in columns]:
            why = f"{name}.parquet has no column {missing[0]}: expected the scores of {record['analysis']}"
            return Broken(file.parent.name, why)
    tensors = file.parent / TENSORS
    if (record["analysis"] in NEED_TENSORS or tensors.exists()) and not whole_safetensors(tensors):
        return Broken(file.parent.name, f"{TENSORS} is missing or damaged: expected the tensors of this run")
    return record


def _stored(root: Path, folder: Path, model: str, record: Mapping[str, Any], changed: tuple[int, int]) -> StoredRun:
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
    return _trained(folder) > str(record.get("created", ""))


def _trained(folder: Path) -> str:
    return _trained_at(folder, _changed(folder / RECORD_FILE))


@lru_cache(maxsize=4096)
def _trained_at(folder: Path, changed: int) -> str:
    """Return `trained_at`, read again when the record, which was changed at `changed`, has changed."""
    return trained_at(folder) if changed else ""


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _model_keys(root: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the key of the model of each run: its folder below `root` if there is one, else its label.

    Where a label is shared by several models, or is a folder below `root`, the key is the whole folder or hub id.
    """
    below = [_folder_below(root, record) for record in records]
    named: dict[str, set[str]] = {}
    for record, key in zip(records, below, strict=True):
        if not key:
            named.setdefault(str(record["label"]), set()).add(_whole_name(record))
    clear = {label for label, models in named.items() if len(models) == 1 and not (root / label).is_dir()}
    keys = []
    for record, key in zip(records, below, strict=True):
        label = str(record["label"])
        keys.append("" if record["analysis"] == LEDGER else key or (label if label in clear else _whole_name(record)))
    return keys


def _folder_below(root: Path, record: Mapping[str, Any]) -> str:
    """Return the folder below `root` of the model of a run, "" if there is none or it has another training."""
    key = "" if record.get("commit") else _key_below(root, str(record.get("model", "")))
    trained = record.get("trained")
    if not key or trained is None or _trained_after(root / key, record):
        return key
    return key if _trained(root / key) == trained else ""


def _whole_name(record: Mapping[str, Any]) -> str:
    """Return the folder or hub id of the model of a run, with its revision, as a relative path."""
    model, revision = str(record.get("model", "")), record.get("revision")
    parts = [part for part in Path(model).parts if part not in (Path(model).anchor, "..")]
    return ("/".join(parts) or str(record["label"])) + (f"@{revision}" if revision else "")


def _key_below(root: Path, model: str) -> str:
    """Return the key of a model that a record names: its folder below `root`, "" if there is none.

    A runs folder may have been copied or moved, so the end of the stored path decides.
    """
    parts = Path(model).parts
    for start in range(len(parts)):
        candidate = Path(*parts[start:])
        if not candidate.is_absolute() and ".." not in candidate.parts and (root / candidate).is_dir():
            return candidate.as_posix()
    return ""


def options_text(run: StoredRun) -> str:
    """Return the options of a run in a few words, without those that its data say."""
    config = run.record["config"]
    shown = {key: value for key, value in config.items() if key not in ("data", "limit", "seed", "data_seed", "source")}
    if run.sources:
        shown = {"source": run.sources[0]} | shown
    words = [f"{key} {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in shown.items() if v != []]
    return one_line(", ".join(words), 200)
