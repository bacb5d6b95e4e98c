"""A finished training as rules read it: from its folder, or from the small JSON file that `python -m trainer.sweep
SWEEP --export` keeps of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.claims.rules import Training
from workbench.errors import RunError, one_line
from workbench.scoring.answers import Answers, answers_of
from workbench.stored_recipe import current_recipe
from workbench.training_folder import (
    BEST,
    EVALUATION_FILE,
    LOG_FILE,
    RECORD_FILE,
    read_table,
    score_log,
    training_record,
)

# what a kept file has of a log
CURVES = {"accuracy/mean": "accuracy", "val_lm_loss": "val_lm_loss", "val_alignment_loss": "val_alignment_loss"}


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        name: the training in the ledger.
        folder: its folder, or where that was if there is a file alone.
        record: recipe, git, dirty, created, and the fingerprints data, val and test.
        kept: what the file says, None where there is a folder.
    """

    name: str
    training: Training
    seed: int
    folder: Path
    record: Mapping[str, Any]
    kept: Mapping[str, Any] | None = None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Values by dotted key."""
        return flat(self.record["recipe"])

    @property
    def finished(self) -> datetime:
        """When it had been trained."""
        return time_of(self.record, str(self.folder / RECORD_FILE))

    @property
    def source(self) -> str:
        """Where its answers are, of the checkpoint that the ledger names."""
        part = BEST if self.training.checkpoint == BEST else "last"
        if self.kept is not None:
            return f"{self.folder}.json, {part}"
        return str((self.folder / BEST if part == BEST else self.folder) / EVALUATION_FILE)

    @cached_property
    def answers(self) -> Answers:
        """Its answers to the questions that it was evaluated on.

        Raises:
            RunError: they are not there, damaged, or no answers to questions with options.
        """
        if self.kept is None:
            return answers_of(Path(self.source).parent, self.record.get("test") or self.record.get("val"))
        stored = self.kept.get(BEST if self.training.checkpoint == BEST else "last")
        if stored is None:
            raise RunError(f"{self.source} is not there: expected the answers of a run with keep_best")
        return Answers.stored(stored, self.source)

    def log(self, column: str) -> pd.DataFrame:
        """A score of its evaluations while it was trained: columns step, score, chance, n, by step.

        Raises:
            RunError: no log, or one without that score.
        """
        where = f"{self.folder}.json" if self.kept is not None else str(self.folder / LOG_FILE)
        if self.kept is not None:
            table = pd.DataFrame(
                {"step": self.kept["curve"]["step"], column: self.kept["curve"].get(CURVES.get(column, column))}
            ).astype(float)
        else:
            table = read_table(self.folder / LOG_FILE)
        if column not in table or not table[column].notna().any():
            raise RunError(f"{where} has no {column}: expected the log of a run that is validated by questions")
        return score_log(table, column).sort_values("step", ignore_index=True)


def find_trained(root: Path, name: str, training: Training, seed: int) -> Trained | None:
    """The run of a training with a seed below a folder, whatever its recipe says; None where it is not there or not
    finished.

    Raises:
        RunError: it is damaged.
    """
    folder = root / training.folder.format(seed=seed)
    if (folder / RECORD_FILE).exists():
        return Trained(name, training, seed, folder, training_record(folder))
    file = folder.with_name(f"{folder.name}.json")
    if not file.exists():
        return None
    try:
        kept = json.loads(file.read_text())
        record = {"recipe": current_recipe(kept["recipe"]), **kept["environment"], **kept["fingerprints"]}
        assert isinstance(kept["curve"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RunError(
            f"{file} is damaged ({one_line(error)}): expected what python -m trainer.sweep --export wrote there"
        ) from error
    return Trained(name, training, seed, folder, record, kept)


def time_of(record: Mapping[str, Any], where: str) -> datetime:
    """When a record was written.

    Raises:
        RunError: it does not say so.
    """
    try:
        return datetime.fromisoformat(record["created"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{where} does not say when it was written ({one_line(error)}): expected a time under 'created'"
        ) from error


def flat(recipe: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The values of a recipe by dotted key."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= flat(value, f"{section}{key}.") if isinstance(value, Mapping) else {f"{section}{key}": value}
    return found
