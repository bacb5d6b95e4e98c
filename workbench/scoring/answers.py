"""Answers of a trained model, counted by question type, from its folder or from the JSON that outlives the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.data.base import content_hash
from workbench.errors import RunError, one_line
from workbench.training_folder import EVALUATION_FILE, evaluation_of


@dataclass(frozen=True)
class Score:
    """The answers to the questions of one type: how many are right, of how many, and the chance level (0..1)."""

    right: int
    n: int
    chance: float


@dataclass(frozen=True)
class Answers:
    """The answers of one model.

    Attributes:
        asked: hash of the questions (fingerprint of the data, ids and types).
        types: {question type: score}.
    """

    asked: str
    types: dict[str, Score]

    @classmethod
    def stored(cls, content: Mapping[str, Any], where: str) -> Answers:
        """Return the answers from what `dataclasses.asdict` made of them.

        Args:
            content: the stored values.
            where: what an error calls the place where they are stored.

        Raises:
            RunError: the stored values are damaged.
        """
        try:
            scores = {
                str(name): Score(int(score["right"]), int(score["n"]), float(score["chance"]))
                for name, score in content["types"].items()
            }
            return cls(content["asked"], scores)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{where} is damaged ({one_line(error)}): expected the keys right, n and chance of each question type"
            ) from error


def answers_of(folder: Path, data: str | None) -> Answers:
    """Return the answers of the trained model in `folder`.

    Args:
        folder: a training folder.
        data: fingerprint of the questions' data set.

    Raises:
        RunError: the stored evaluation is damaged, or is not one answer to each of its questions with options.
    """
    table, file = evaluation_of(folder), folder / EVALUATION_FILE
    if missing := [name for name in ("id", "category", "correct", "chance") if name not in table]:
        raise RunError(f"{file} has no column {missing[0]}: expected answers to questions with options")
    for problem, wrong in (("twice", table["id"].duplicated()), ("without an answer", table["correct"].isna())):
        if wrong.any():
            raise RunError(
                f"{file} has question {table['id'][wrong].iloc[0]} {problem}: expected each question once, right or"
                " wrong"
            )
    types = table.groupby("category").agg(right=("correct", "sum"), n=("correct", "size"), chance=("chance", "mean"))
    scores = {str(row.Index): Score(int(row.right), int(row.n), float(row.chance)) for row in types.itertuples()}
    return Answers(content_hash(data, *table["id"], *table["category"]), scores)
