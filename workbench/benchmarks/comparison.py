"""Several models on one benchmark: their scores, and paired differences to the first one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.benchmarks.tables import ALL, by_question, judged
from workbench.intervals import mean_interval
from workbench.training_folder import MEAN

ASKED = ("prompt", "shown", "scorer")  # what must be equal for a difference
POWER = 0.8416 + 1.96  # standard errors between 0 and a difference that four of five experiments show
DIFFERENCES = ("difference", "difference_low", "difference_high", "smallest")
SUMMARY = (
    "model",
    "prompt",
    "shown",
    "scorer",
    "measure",
    "category",
    "score",
    "low",
    "high",
    "chance",
    "majority",
    "unparsed",
    "n",
    "n_images",
    *DIFFERENCES,
)


def compared(scores: Mapping[str, pd.DataFrame], answers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the scores of all models, with the paired difference of each accuracy to that of the first model.

    There is no difference where a model was asked other questions than the first one, or with another prompt.

    Args:
        scores: {model: `tables.scores`}.
        answers: {model: its answers}.
    """
    first: dict[Any, pd.DataFrame] = {}
    tables: list[pd.DataFrame] = []
    for model, model_scores in scores.items():
        table = model_scores.assign(model=model)
        table[list(DIFFERENCES)] = np.nan
        parts = dict(iter(judged(answers[model]).groupby(list(ASKED))))
        if not tables:
            first, parts = parts, {}
        for asked, part in parts.items():
            if asked not in first or _questions(first[asked]) != _questions(part):
                continue
            reference = first[asked]
            place = (table[list(ASKED)] == asked).all(axis=1) & (table["measure"] == "accuracy")
            for category in (ALL, MEAN):
                values = difference(reference, part, by_type=category == MEAN)
                table.loc[place & (table["category"] == category), list(values)] = list(values.values())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _questions(answers: pd.DataFrame) -> set[tuple[str, ...]]:
    """Return what was asked: equal ids alone may be those of another data set, or of other labels."""
    return set(answers[["id", "question", "gold", "options"]].itertuples(index=False, name=None))


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """Return `compared` without the scores of single categories, in the order of the columns of a summary."""
    rows = table["category"].isin([ALL, MEAN]) | (table["measure"] == "MME score")
    return table[rows][list(SUMMARY)]


def difference(first: pd.DataFrame, second: pd.DataFrame, *, by_type: bool) -> dict[str, float]:
    """Return the paired difference in accuracy of two models, second minus first, on the questions that both answered.

    Args:
        first, second: judged answers of one scorer and one thing shown.
        by_type: whether every category has the same weight, or every question.

    Returns:
        difference, difference_low, difference_high, and smallest: the smallest difference that so many questions show
        with a power of 80 %, estimated from the width of the interval.
    """
    columns = ["id", "image_id", "category", "correct"]
    pairs = by_question(first)[columns].merge(by_question(second)[["id", "correct"]], on="id", suffixes=("", "_second"))
    change = pairs["correct_second"] - pairs["correct"]
    strata = pairs["category"].tolist() if by_type else None
    interval = mean_interval(change, kind="difference", groups=pairs["image_id"].tolist(), strata=strata)
    return {
        "difference": interval.estimate,
        "difference_low": interval.low,
        "difference_high": interval.high,
        "smallest": POWER * (interval.high - interval.low) / (2 * 1.96),
    }
