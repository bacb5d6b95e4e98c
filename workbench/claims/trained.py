"""A finished training as rules read it: from its folder, or from its exported JSON file.

`python -m trainer.sweep SWEEP --export FOLDER` writes the file, which keeps the results without the model.
"""

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

# {column of a training log: its name in an exported file}
CURVES = {"accuracy/mean": "accuracy", "val_lm_loss": "val_lm_loss", "val_alignment_loss": "val_alignment_loss"}


@dataclass(frozen=True)
class Trained:
    """A finished training of a ledger.

    Attributes:
        name: its name in the ledger.
        folder: its folder; if only an exported file exists, the folder that it was exported from.
        record: recipe, git, dirty, created, and the fingerprints data, val and test.
        exported: content of the exported file; None if the folder exists.
    """

    name: str
    training: Training
    seed: int
    folder: Path
    record: Mapping[str, Any]
    exported: Mapping[str, Any] | None = None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's values by dotted key."""
        return flat(self.record["recipe"])

    @property
    def finished(self) -> datetime:
        """Time at which the training finished."""
        return time_of(self.record, str(self.folder / RECORD_FILE))

    @property
    def source(self) -> str:
        """File with the answers of the checkpoint that the ledger names."""
        part = BEST if self.training.checkpoint == BEST else "last"
        if self.exported is not None:
            return f"{self.folder}.json, {part}"
        return str((self.folder / BEST if part == BEST else self.folder) / EVALUATION_FILE)

    @cached_property
    def answers(self) -> Answers:
        """The answers to the questions on which the model was evaluated.

        Raises:
            RunError: the answers are missing or damaged, or do not answer questions with options.
        """
        if self.exported is None:
            return answers_of(Path(self.source).parent, self.record.get("test") or self.record.get("val"))
        answers = self.exported.get(BEST if self.training.checkpoint == BEST else "last")
        if answers is None:
            raise RunError(f"{self.source} is not there: expected the answers of a run with keep_best")
        return Answers.stored(answers, self.source)

    def log(self, column: str) -> pd.DataFrame:
        """Return a score of the evaluations during training.

        Returns:
            Columns step, score, chance and n, sorted by step.

        Raises:
            RunError: there is no log, or it does not have the score.
        """
        where = f"{self.folder}.json" if self.exported is not None else str(self.folder / LOG_FILE)
        if self.exported is not None:
            curve = self.exported["curve"]
            table = pd.DataFrame({"step": curve["step"], column: curve.get(CURVES.get(column, column))}).astype(float)
        else:
            table = read_table(self.folder / LOG_FILE)
        if column not in table or not table[column].notna().any():
            raise RunError(f"{where} has no {column}: expected the log of a run that is validated by questions")
        return score_log(table, column).sort_values("step", ignore_index=True)


def find_trained(root: Path, name: str, training: Training, seed: int) -> Trained | None:
    """Return the run of a training with a seed in a folder, whatever its recipe; None if none has finished there.

    Raises:
        RunError: the run's record or exported file is damaged.
    """
    folder = root / training.folder.format(seed=seed)
    if (folder / RECORD_FILE).exists():
        return Trained(name, training, seed, folder, training_record(folder))
    file = folder.with_name(f"{folder.name}.json")
    if not file.exists():
        return None
    try:
        exported = json.loads(file.read_text())
        record = {"recipe": current_recipe(exported["recipe"]), **exported["environment"], **exported["fingerprints"]}
        assert isinstance(exported["curve"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RunError(
            f"{file} is damaged ({one_line(error)}): expected what python -m trainer.sweep --export wrote there"
        ) from error
    return Trained(name, training, seed, folder, record, exported)


def time_of(record: Mapping[str, Any], where: str) -> datetime:
    """Return the time at which a record was written.

    Raises:
        RunError: the record has no time.
    """
    try:
        return datetime.fromisoformat(record["created"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{where} does not say when it was written ({one_line(error)}): expected a time under 'created'"
        ) from error


def flat(recipe: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return the values of a recipe by dotted key."""
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        values |= flat(value, f"{section}{key}.") if isinstance(value, Mapping) else {f"{section}{key}": value}
    return values
