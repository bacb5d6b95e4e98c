"""The stored runs that rules judge: trainings by variant and seed, and analyses of them. Nothing is computed here and
nothing is guessed.

A training counts where its recipe is what the ledger says; an analysis counts where it lies beside the training, was
asked what the ledger's command asks, and was stored after the training had finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.claims.rules import Ledger, options_of
from workbench.claims.trained import Trained, find_trained, time_of
from workbench.errors import RunError, one_line
from workbench.runs import RUN_FILE
from workbench.training_folder import read_table

log = logging.getLogger(__name__)

# change no number
ANY = (
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
    """A run that is not there, and the command that makes it, with `{models}` for the model that it is about."""

    def __init__(self, what: str, command: str, model: str = "") -> None:
        super().__init__(f"{what} is not there")
        self.what, self.command, self.model = what, command, model


def commands(missing: Iterable[MissingRun]) -> list[str]:
    """The commands that make some runs, each once: one analysis of several models is one command."""
    models: dict[str, list[str]] = {}
    for run in missing:
        models.setdefault(run.command, []).append(run.model)
    return [command.replace("{models}", " ".join(dict.fromkeys(own))) for command, own in models.items()]


@dataclass(frozen=True)
class Stored:
    """A stored analysis: its folder and its record; tables are read when they are asked for."""

    folder: Path
    record: Mapping[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """One of its tables.

        Raises:
            RunError: it is not there, or damaged.
        """
        return read_table(self.folder / f"{name}.parquet")

    @property
    def asked(self) -> tuple[object, ...]:
        """What must be the same for two numbers to be compared."""
        config = {
            key: value for key, value in self.record["config"].items() if key not in ("source", "source_revision")
        }
        return (self.record["data_fingerprint"], self.record["version"], json.dumps(config, sort_keys=True))


class Evidence:
    """What lies in some folders of runs, as a ledger needs it."""

    def __init__(self, ledger: Ledger, roots: Sequence[Path]) -> None:
        self.ledger = ledger
        self.roots = list({root.resolve(): root for root in roots}.values())  # each once, as the user called it
        self._trained: dict[tuple[str, int], Trained | Exception] = {}
        self._stored: dict[Path, list[Stored]] = {}

    def trained(self, name: str, seed: int) -> Trained:
        """The run of a training with a seed, once it is seen to be what the ledger says.

        Raises:
            MissingRun: it is not there.
            RunError: it is damaged, there are two, or its recipe, its seed or its data are not what the ledger says.
        """
        key = (name, seed)
        if key not in self._trained:
            try:
                self._trained[key] = self._find(name, seed)
            except (MissingRun, RunError) as error:
                self._trained[key] = error
        found = self._trained[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _find(self, name: str, seed: int) -> Trained:
        training = self.ledger.trainings[name]
        roots = [root for root in self.roots if root.resolve().name == Path(training.runs).name] or self.roots
        named = [one for root in roots if (one := find_trained(root, name, training, seed)) is not None]
        # runs of other data may be called the same
        named = [one for one in named if one.recipe.get("data.train") == self._data(name)]
        said = [next(self.wrong(one), "") for one in named]
        found = [one for one, wrong in zip(named, said, strict=True) if not wrong]
        if len(found) > 1:
            raise RunError(
                f"{found[0].folder} and {found[1].folder} are both {name} of seed {seed}: expected one of them below"
                " --runs"
            )
        if not found and said:
            raise RunError(said[0])
        if not found:
            raise MissingRun(training.folder.format(seed=seed), f"python -m trainer.sweep {training.sweep}")
        if training.like:
            self.check_like(found[0], self.trained(training.like, seed))
        return found[0]

    def _data(self, name: str) -> Any:
        """What a training of the ledger learns from."""
        training = self.ledger.trainings[name]
        return training.recipe["data.train"] if "data.train" in training.recipe else self._data(training.like)

    @staticmethod
    def wrong(one: Trained) -> Iterator[str]:
        """What of a recipe is not what the ledger says."""
        for key, value in {**one.training.recipe, "seed": one.seed}.items():
            if key not in one.recipe or one.recipe[key] != value:
                yield (
                    f"{one.folder} was trained with {key} {one.recipe.get(key, 'absent')}: expected {value}, as"
                    f" {one.name} in the ledger has"
                )

    @staticmethod
    def check_like(one: Trained, other: Trained) -> None:
        """See that two runs differ in nothing but what the ledger lets differ."""
        differ = [
            key
            for key in sorted((one.recipe.keys() | other.recipe.keys()) - {*ANY})
            if one.recipe.get(key) != other.recipe.get(key)
        ]
        free = ", ".join(one.training.but) or "nothing"
        for key in differ:
            if not any(key == own or key.startswith(f"{own}.") for own in one.training.but):
                values = f"{one.recipe.get(key)} and {other.recipe.get(key)}"
                raise RunError(
                    f"{one.folder} and {other.folder} differ in {key}, {values}: expected the same but for {free}"
                )
        if one.training.but and not differ:
            raise RunError(f"{one.folder} and {other.folder} have one recipe: expected recipes that differ in {free}")
        data = [own.record.get("data") for own in (one, other)]
        if data[0] != data[1]:
            raise RunError(
                f"{one.folder} and {other.folder} learned from data with fingerprints {data[0]} and {data[1]}: expected"
                " the same data"
            )

    # --- analyses ---------------------------------------------------------------------------------

    def analysis(self, name: str, of: Trained, source: Trained | None = None) -> Stored:
        """The stored analysis of a run, with the options that the ledger's command has.

        Raises:
            MissingRun: it is not there.
            RunError: it is damaged, there are several, or it is older than the training.
        """
        asked = {"seed": ["0"], "data_seed": ["0"]} | options_of(self.ledger.analyses[name])
        found = [
            own
            for own in self._beside(of)
            if own.record["analysis"] == name and _model(own.record["model"]) == of.folder.name
        ]
        found = [
            own
            for own in found
            if all(_same(own.record["config"].get(option), words) for option, words in asked.items())
        ]
        if source is not None:
            found = [own for own in found if _model(own.record["config"].get("source", "")) == source.folder.name]
        if not found:
            words = self.ledger.analyses[name].replace("{runs}", str(of.folder.parent))
            raise MissingRun(
                f"{name} of {of.folder.name}",
                words.replace("{source}", str(source.folder) if source is not None else ""),
                str(of.folder),
            )
        if len(found) > 1:
            raise RunError(
                f"{found[0].folder} and {found[1].folder} both are {name} of {of.folder.name}: expected one of them"
            )
        for trained in (of, *([source] if source is not None else [])):
            if time_of(found[0].record, str(found[0].folder / RUN_FILE)) < trained.finished:
                raise RunError(
                    f"{found[0].folder} is older than the training in {trained.folder}: expected an analysis of the"
                    " model that is there now"
                )
        return found[0]

    def _beside(self, run: Trained) -> list[Stored]:
        """The stored analyses in the folder that a run lies in."""
        root = run.folder.parent
        if root not in self._stored:
            self._stored[root] = _stored(root)
        return self._stored[root]


def _stored(root: Path) -> list[Stored]:
    """Every stored analysis below a folder."""
    found = []
    for path in sorted(root.glob(f"*/{RUN_FILE}")):
        try:
            record = json.loads(path.read_text())
            if all(
                name in record for name in ("analysis", "model", "config", "data_fingerprint", "version", "created")
            ):
                found.append(Stored(path.parent, record))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s is damaged (%s): what it would say is not there", path, one_line(error))
    return found


def _model(name: str) -> str:
    """The last part of a model's folder; NAME=FOLDER has a name of its own."""
    return Path(name.partition("=")[2] or name).name


def _same(value: Any, words: Any) -> bool:
    """Whether a stored option has the value that the words of a command have."""
    if isinstance(words, bool) or isinstance(value, bool):
        return value is words
    values = value if isinstance(value, list | tuple) else [value]
    return len(values) == len(words) and all(_equal(own, word) for own, word in zip(values, words, strict=True))


def _equal(value: Any, word: str) -> bool:
    try:
        return float(value) == float(word)
    except (TypeError, ValueError):
        return str(value) == word
