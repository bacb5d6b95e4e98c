"""Find the stored runs that rules judge: trainings by variant and seed, and analyses of them.

A training counts only if its recipe is the one in the ledger. An analysis counts only if it lies in the same folder as
the training, has the options of the ledger's command, and was stored after the training had finished. Nothing is
computed here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.analysis.discover import load_analysis
from workbench.claims.rules import NOT_HASHED, Ledger, options_of
from workbench.claims.trained import Trained, find_trained, time_of
from workbench.errors import PluginError, RunError, UnknownNameError, one_line
from workbench.records import read_run_record
from workbench.runs import RUN_FILE
from workbench.training_folder import read_table

log = logging.getLogger(__name__)

# recipe keys that change no number, so that they may differ between runs that are compared
IGNORED_KEYS = (
    "output_dir",
    "report_to",
    "resume",
    "repaired",
    "dry_run",
    "push_to_hub",
    "keep_checkpoints",
    "keep_best",
    "save_every",
)


class MissingRun(Exception):
    """A run that was not found, and the command that makes it.

    Attributes:
        what: the run, in words.
        command: may have `{models}` in it, for the models that `commands` collects.
        model: folder of the model that the run is about; empty for a training.
    """

    def __init__(self, what: str, command: str, model: str = "") -> None:
        super().__init__(f"{what} was not found")
        self.what, self.command, self.model = what, command, model


def commands(missing: Iterable[MissingRun]) -> list[str]:
    """Return the commands that make missing runs; the same analysis of several models is one command."""
    models_of: dict[str, list[str]] = {}
    for run in missing:
        models_of.setdefault(run.command, []).append(run.model)
    return [command.replace("{models}", " ".join(dict.fromkeys(models))) for command, models in models_of.items()]


@dataclass(frozen=True)
class StoredAnalysis:
    """A stored analysis: its folder and its record; a table is read when it is asked for."""

    folder: Path
    record: Mapping[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """Read one of its tables.

        Raises:
            RunError: the table does not exist, or is damaged.
        """
        return read_table(self.folder / f"{name}.parquet")

    @property
    def asked(self) -> tuple[object, ...]:
        """What must be equal for numbers of two runs to be compared: data, version of the analysis, options."""
        config = {
            key: value for key, value in self.record["config"].items() if key not in ("source", "source_revision")
        }
        return (self.record["data_fingerprint"], self.record["version"], json.dumps(config, sort_keys=True))


class Evidence:
    """The runs in some folders, looked up as a ledger names them.

    Args:
        roots: folders that hold trainings and analyses of them.
    """

    def __init__(self, ledger: Ledger, roots: Sequence[Path]) -> None:
        self.ledger = ledger
        self.roots = list({root.resolve(): root for root in roots}.values())  # each once, as the user wrote it
        self._trained: dict[tuple[str, int], Trained | Exception] = {}
        self._analyses: dict[Path, list[StoredAnalysis]] = {}

    def trained(self, name: str, seed: int) -> Trained:
        """Return the run of a training of the ledger with a seed, after checking that it is what the ledger says.

        Raises:
            MissingRun: there is no such run.
            RunError: the run is damaged, there are two, or its recipe, its seed or its data are not what the ledger
                says.
        """
        key = (name, seed)
        if key not in self._trained:
            try:
                self._trained[key] = self._find(name, seed)
            except (MissingRun, RunError) as error:
                self._trained[key] = error
        run = self._trained[key]
        if isinstance(run, Exception):
            raise run
        return run

    def _find(self, name: str, seed: int) -> Trained:
        training = self.ledger.trainings[name]
        roots = [root for root in self.roots if root.resolve().name == Path(training.runs).name] or self.roots
        candidates = [run for root in roots if (run := find_trained(root, name, training, seed)) is not None]
        # runs on other data may have the same name
        candidates = [run for run in candidates if run.recipe.get("data.train") == self._train_data(name)]
        first_mismatches = [next(self.mismatches(run), "") for run in candidates]
        matches = [run for run, mismatch in zip(candidates, first_mismatches, strict=True) if not mismatch]
        if len(matches) > 1:
            raise RunError(
                f"{matches[0].folder} and {matches[1].folder} are both {name} of seed {seed}: expected only one of them"
                " below --runs"
            )
        if not matches and first_mismatches:
            raise RunError(first_mismatches[0])
        if not matches:
            raise MissingRun(training.folder.format(seed=seed), f"python -m trainer.sweep {training.sweep}")
        if training.like:
            self.check_like(matches[0], self.trained(training.like, seed))
        return matches[0]

    def _train_data(self, name: str) -> Any:
        """Return the training data of a training of the ledger: its own, or that of the training that it is like."""
        training = self.ledger.trainings[name]
        return training.recipe["data.train"] if "data.train" in training.recipe else self._train_data(training.like)

    @staticmethod
    def mismatches(run: Trained) -> Iterator[str]:
        """Yield a sentence for each value of a run's recipe that is not the ledger's."""
        for key, value in {**run.training.recipe, "seed": run.seed}.items():
            if key not in run.recipe or run.recipe[key] != value:
                yield (
                    f"{run.folder} was trained with {key} {run.recipe.get(key, 'absent')}: expected {value}, as for"
                    f" {run.name} in the ledger"
                )

    @staticmethod
    def check_like(run: Trained, other: Trained) -> None:
        """Check that two runs differ only in what the ledger allows, and have the same training data.

        Raises:
            RunError: they differ in something else, or in nothing although they should.
        """
        different = [
            key
            for key in sorted((run.recipe.keys() | other.recipe.keys()) - {*IGNORED_KEYS})
            if run.recipe.get(key) != other.recipe.get(key)
        ]
        allowed = ", ".join(run.training.but) or "nothing"
        for key in different:
            if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in run.training.but):
                values = f"{run.recipe.get(key)} and {other.recipe.get(key)}"
                raise RunError(
                    f"{run.folder} and {other.folder} differ in {key}, {values}: expected recipes that differ in"
                    f" {allowed} only"
                )
        if run.training.but and not different:
            raise RunError(
                f"{run.folder} and {other.folder} have the same recipe: expected recipes that differ in {allowed}"
            )
        data = [each.record.get("data") for each in (run, other)]
        if data[0] != data[1]:
            raise RunError(
                f"{run.folder} and {other.folder} were trained on data with fingerprints {data[0]} and {data[1]}:"
                " expected the same data"
            )

    # --- analyses ---------------------------------------------------------------------------------

    def analysis(self, name: str, of: Trained, source: Trained | None = None) -> StoredAnalysis:
        """Return the stored analysis of a run, with the options of the ledger's command and defaults for all others.

        Args:
            name: the analysis in the ledger.
            of: the run that it is about.
            source: the run whose model the option `source` names (patching).

        Raises:
            MissingRun: there is no such analysis.
            RunError: there are several, or it is older than the training.
        """
        options = {"seed": ["0"], "data_seed": ["0"]} | options_of(self.ledger.analyses[name])
        matches = [
            stored
            for stored in self._beside(of)
            if stored.record["analysis"] == name
            and _model(stored.record["model"]) == of.folder.name
            # a training in another folder may have the same name; older runs do not record when theirs was finished
            and stored.record.get("trained") in (None, "", of.record.get("created"))
        ]
        matches = [
            stored
            for stored in matches
            if all(_same(stored.record["config"].get(option), words) for option, words in options.items())
            and not changed_options(name, stored.record["config"]) - options.keys()
        ]
        if source is not None:
            matches = [
                stored for stored in matches if _model(stored.record["config"].get("source", "")) == source.folder.name
            ]
        if not matches:
            command = self.ledger.analyses[name].replace("{runs}", str(of.folder.parent))
            raise MissingRun(
                f"{name} of {of.folder.name}",
                command.replace("{source}", str(source.folder) if source is not None else ""),
                str(of.folder),
            )
        if len(matches) > 1:
            raise RunError(
                f"{matches[0].folder} and {matches[1].folder} are both {name} of {of.folder.name}: expected only one"
            )
        for trained in (of, *([source] if source is not None else [])):
            if time_of(matches[0].record, str(matches[0].folder / RUN_FILE)) < trained.finished:
                raise RunError(
                    f"{matches[0].folder} is older than the training in {trained.folder}: expected an analysis of the"
                    " model that is there now"
                )
        return matches[0]

    def _beside(self, run: Trained) -> list[StoredAnalysis]:
        """Return the stored analyses in the folder that contains a run's folder."""
        root = run.folder.parent
        if root not in self._analyses:
            self._analyses[root] = _stored_analyses(root)
        return self._analyses[root]


def _stored_analyses(root: Path) -> list[StoredAnalysis]:
    """Return every stored analysis in a folder; damaged ones are left out with a warning."""
    analyses = []
    for path in sorted(root.glob(f"*/{RUN_FILE}")):
        try:
            record = read_run_record(path)
        except RunError as error:
            log.warning("%s, and is left out", one_line(error, 300))
            continue
        if {"model", "data_fingerprint", "version", "created"} <= record.keys():
            analyses.append(StoredAnalysis(path.parent, record))
    return analyses


def changed_options(analysis: str, config: Mapping[str, Any]) -> set[str]:
    """Return the options of a stored analysis that do not have their default, but for those that no rule names.

    A run with one that the ledger's command does not name, such as `--metric cka`, answers another question.
    """
    try:
        defaults = {each.name: each.default for each in fields(load_analysis(analysis).config)}
    except (PluginError, UnknownNameError):
        return set()
    named = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    ignored = {option.removeprefix("--") for option in NOT_HASHED}
    return {name for name in config.keys() & named.keys() - ignored if config[name] != named[name]}


def _model(name: str) -> str:
    """Return the last part of a model's folder, which may be written as NAME=FOLDER."""
    return Path(name.partition("=")[2] or name).name


def _same(value: Any, words: Any) -> bool:
    """Return whether a stored option has the value that a command's words give it."""
    if isinstance(words, bool) or isinstance(value, bool):
        return value is words
    values = value if isinstance(value, list | tuple) else [value]
    return len(values) == len(words) and all(_equal(item, word) for item, word in zip(values, words, strict=True))


def _equal(value: Any, word: str) -> bool:
    try:
        return float(value) == float(word)
    except (TypeError, ValueError):
        return str(value) == word
