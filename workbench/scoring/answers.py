"""What a trained model answered, counted by question type; read from its folder, or from the JSON that outlives it."""

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
    """Answers to the questions of one type."""

    right: int
    n: int
    chance: float


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        asked: hash of the questions: data, ids and types.
        types: {question type: score}.
    """

    asked: str
    types: dict[str, Score]

    @classmethod
    def stored(cls, content: Mapping[str, Any], where: str) -> Answers:
        """From what `dataclasses.asdict` made of it.

        Raises:
            RunError: it is damaged; `where` is it.
        """
        try:
            return cls(
                content["asked"],
                {
                    str(name): Score(int(own["right"]), int(own["n"]), float(own["chance"]))
                    for name, own in content["types"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{where} is damaged ({one_line(error)}): expected right answers, n and chance of each question type"
            ) from error


def answers_of(folder: Path, data: str | None) -> Answers:
    """What the model in `folder` answered.

    Args:
        data: fingerprint of the questions' data set.

    Raises:
        RunError: no answers to questions with options, each once; or they are damaged.
    """
    table, file = evaluation_of(folder), folder / EVALUATION_FILE
    if absent := [name for name in ("id", "category", "correct", "chance") if name not in table]:
        raise RunError(f"{file} has no column {absent[0]}: expected answers to questions with options")
    for column, wrong in (("twice", table["id"].duplicated()), ("without an answer", table["correct"].isna())):
        if wrong.any():
            raise RunError(
                f"{file} has question {table['id'][wrong].iloc[0]} {column}: expected each question once, right or"
                " wrong"
            )
    types = table.groupby("category").agg(right=("correct", "sum"), n=("correct", "size"), chance=("chance", "mean"))
    scores = {str(row.Index): Score(int(row.right), int(row.n), float(row.chance)) for row in types.itertuples()}
    return Answers(content_hash(data, *table["id"], *table["category"]), scores)
