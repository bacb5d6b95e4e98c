"""Several models on one benchmark: their scores, and paired differences to the first one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.benchmarks.means import Mean, means
from workbench.benchmarks.tables import LETTER_RATE, judged
from workbench.scoring.tables import ALL
from workbench.training_folder import MEAN

ASKED = ("prompt", "shown", "scorer")  # what must be equal for a difference
POWER = 0.8416 + 1.96  # standard errors between 0 and a difference that four of five experiments show
DIFFERENCES = ("difference", "difference_low", "difference_high", "smallest")
OURS = ("own", "sum")  # scorers of which a summary has how often each letter is read
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
    """Return the scores of all models, with the paired difference of each mean to that of the first model.

    Ratios such as precision have no difference. Nor is there one where a model was asked other questions than the first
    one, with another prompt, or for another number of answers to each question: drawn answers are no greedy ones.

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
            if asked not in first or _asked(first[asked]) != _asked(part):
                continue
            place, references = (table[list(ASKED)] == asked).all(axis=1), means(first[asked])
            for (measure, category), mean in means(part).items():
                row = place & (table["measure"] == measure) & (table["category"] == category)
                values = difference(references[measure, category], mean)
                table.loc[row, list(values)] = list(values.values())
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def questions_asked(answers: pd.DataFrame) -> set[tuple[str, ...]]:
    """Return what was asked: equal ids alone may be those of another data set, or of other labels."""
    return set(answers[["id", "question", "gold", "options"]].itertuples(index=False, name=None))


def _asked(answers: pd.DataFrame) -> tuple[set[tuple[str, ...]], int]:
    """Return what was asked, and how often."""
    return questions_asked(answers), answers["draw"].nunique()


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """Return what a reader wants of `compared`: the same score of all scorers and models is on consecutive rows.

    Scores of single categories are left out, and so is how often other scorers than ours read each letter, or ours in
    a blind run; MME's categories stay.
    """
    rows = table["category"].isin([ALL, MEAN]) | (table["measure"] == "MME score")
    ours = table["scorer"].isin(OURS) & (table["shown"] == "image")
    table = table[rows & (ours | ~table["measure"].str.startswith(LETTER_RATE))]
    places = {
        name: table[name].map({value: place for place, value in enumerate(table[name].unique())})
        for name in ("shown", "measure", "category", "scorer", "model")
    }
    order = pd.DataFrame(places).sort_values(list(places), kind="stable").index
    return table.loc[order, list(SUMMARY)].reset_index(drop=True)


def difference(first: Mean, second: Mean) -> dict[str, float]:
    """Return the paired difference in a score of two models, second minus first, on the units that both have.

    Returns:
        difference, difference_low, difference_high, and smallest: the smallest difference that so many questions show
        with a power of 80 %, estimated from the width of the interval.
    """
    both = second.values.merge(first.values[["unit", "value"]], on="unit", suffixes=("", "_first"))
    interval = second.interval(both.assign(value=both["value"] - both["value_first"]), "difference")
    return {
        "difference": interval.estimate,
        "difference_low": interval.low,
        "difference_high": interval.high,
        "smallest": POWER * (interval.high - interval.low) / (2 * 1.96),
    }
