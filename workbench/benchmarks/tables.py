"""Tables of a benchmark's scores, by scorer, from the answers of one model: each with interval, chance level and n.

Intervals are over images, or over pairs where a pair counts as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from workbench.benchmarks.means import by_question, means
from workbench.benchmarks.scorers import LETTERED, YES_NO, Judged, by_likelihood, letter_of, reads_letters, scorers_of
from workbench.data.base import Sample
from workbench.intervals import Interval, mean_interval, mean_intervals
from workbench.scoring.tables import ALL as ALL
from workbench.training_folder import MEAN

LETTER_RATE = "rate of "  # begins the name of the measure
_MISSING = Judged(None, False)


def answer_row(
    benchmark: str,
    sample: Sample,
    shown: str,
    answer: str | None,
    *,
    prompt: str = "",
    draw: int = 0,
    logprobs: str = "",
    tokens: str = "",
) -> dict[str, Any]:
    """Return what is stored of an answer, with all that its scoring needs.

    Args:
        benchmark: name of the benchmark, "" if the data set is none.
        sample: the question.
        shown: what the model saw: "image", or in a blind run "mean image" or "no image".
        answer: the text that the model generated, or the option that it finds likeliest; None where a file of answers
            has none.
        prompt: name of the prompt that it was asked with, "" if that is not known.
        draw: number of the answer, if several were drawn.
        logprobs: JSON list of the log-probability of each option, "" for a generated answer.
        tokens: JSON list of the number of tokens of each option, likewise.
    """
    return {
        "benchmark": benchmark,
        "id": sample.id,
        "image_id": sample.image_id,
        "category": sample.category,
        "source": sample.source,
        "pair": sample.pair,
        "question": sample.question,
        "options": json.dumps(sample.options),
        "gold": sample.answer,
        "chance": sample.chance,
        "prompt": prompt,
        "shown": shown,
        "answer": answer,
        "draw": draw,
        "logprobs": logprobs,
        "tokens": tokens,
    }


def judged(answers: pd.DataFrame) -> pd.DataFrame:
    """Return the answers once for each scorer, with the columns scorer, parsed (None if it could not) and correct.

    A missing answer is wrong by every scorer, also by those that take an empty one as right.
    """
    rows: list[dict[str, Any]] = []
    for row in answers.to_dict("records"):
        sample = _sample(row)
        if row["logprobs"]:
            results = by_likelihood(row["benchmark"], sample, json.loads(row["logprobs"]), json.loads(row["tokens"]))
        else:
            scorers = scorers_of(row["benchmark"], sample)
            missing = pd.isna(row["answer"])
            results = {name: _MISSING if missing else judge(sample, row["answer"]) for name, judge in scorers.items()}
        for name, result in results.items():
            rows.append({**row, "scorer": name, "parsed": result.parsed, "correct": result.correct})
    return pd.DataFrame(rows)


def scores(answers: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Return one row for each score.

    Returns:
        Columns prompt, shown, scorer, measure, category, score, low, high, few, chance, majority (the accuracy of
        giving each category's most frequent right answer, NaN for a score that is no accuracy), unparsed (answers that
        are missing or that the scorer cannot read, of all draws), n (questions, pairs or sets), n_images, draws
        (answers to each question), seed. Scores are means over draws; chance, majority and rates, too, give every
        question the same weight, however often it was asked.
    """
    rows: list[dict[str, Any]] = []
    benchmark = str(answers["benchmark"].iloc[0])
    for (prompt, shown, scorer), part in judged(answers).groupby(["prompt", "shown", "scorer"], sort=False):
        named = {"prompt": prompt, "shown": shown, "scorer": scorer}
        part = part.assign(weight=1 / part.groupby("id")["id"].transform("size"))
        part = part.assign(by_majority=_by_majority(part, benchmark))
        rows += [named | row | {"seed": seed} for row in _rows(part, benchmark, str(scorer))]
    return pd.DataFrame(rows)


def _sample(row: Mapping[str, Any]) -> Sample:
    """Return the question of a stored answer, without its image."""
    options = tuple(json.loads(row["options"]))
    return Sample(row["id"], row["image_id"], _no_image, row["question"], row["gold"], options, row["category"])


def _no_image() -> Any:
    raise AssertionError("a stored answer has no image")


def _rows(part: pd.DataFrame, benchmark: str, scorer: str) -> Iterator[dict[str, Any]]:
    """Yield the scores of one scorer."""
    for mean in means(part).values():
        levels = {"majority": np.nan if mean.chance is not None else mean.level("by_majority")}
        chance = mean.level("chance") if mean.chance is None else mean.chance
        yield _row(mean.measure, mean.category, mean.interval(), mean.rows, chance, mean.n) | levels
    if set(part["gold"]) <= set(YES_NO):
        categories = [str(name) for name in part["category"].unique() if name]
        for name in [ALL, *(categories if len(categories) > 1 else [])]:
            rows = part if name == ALL else part[part["category"] == name]
            yield from _yes_no_rows(rows, name, benchmark == "pope" and scorer == "lmms")
    if benchmark == "pope":
        yield from _f1_of_splits(part)
    if reads_letters(benchmark, scorer):
        yield from _letter_rates(part)


def _row(
    measure: str, category: str, interval: Interval, rows: pd.DataFrame, chance: float, n: int | None = None
) -> dict[str, Any]:
    return {
        "measure": measure,
        "category": category,
        "score": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "few": interval.few,
        "chance": chance,
        "majority": np.nan,
        "unparsed": int(rows["parsed"].isna().sum()),
        "n": rows["id"].nunique() if n is None else n,
        "n_images": rows["image_id"].nunique(),
        "draws": rows["draw"].nunique(),
    }


def _mean(rows: pd.DataFrame, values: pd.Series) -> float:
    """Return the mean of values over questions."""
    return float((values * rows["weight"]).sum() / rows["weight"].sum())


def _letter_rates(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield how often each letter is answered, beside how often it is right as `chance`."""
    golds = _gold_letters(rows)
    for letter in sorted({*golds, *rows["parsed"].dropna()}):
        said = by_question(rows.assign(correct=rows["parsed"] == letter))
        interval = mean_interval(said["correct"], kind="proportion", groups=said["image_id"].tolist())
        yield _row(f"{LETTER_RATE}{letter}", ALL, interval, rows, _mean(rows, golds == letter))


def _gold_letters(rows: pd.DataFrame) -> pd.Series:
    return pd.Series([letter_of(_sample(row)) for row in rows.to_dict("records")], index=rows.index)


def _by_majority(rows: pd.DataFrame, benchmark: str) -> pd.Series:
    """Return whether the right answer is its category's most frequent one: as a letter, where answers are letters.

    Where the categories are the right answers (What's Up, GQA), it is the most frequent one of all questions.
    """
    golds = _gold_letters(rows) if benchmark in LETTERED else rows["gold"]
    categories = rows["category"]
    if golds.groupby(categories).nunique().max() == 1:
        categories = pd.Series("", rows.index)
    counts = rows["weight"].groupby([categories, golds]).sum()
    most = {str(category): of.droplevel(0).idxmax() for category, of in counts.groupby(level=0)}
    return golds == categories.map(most)


# --- ratios of counts -----------------------------------------------------------------------------


def _yes_no_rows(rows: pd.DataFrame, category: str, lmms: bool) -> Iterator[dict[str, Any]]:
    """Yield precision, recall, F1 and the share of yes; for POPE by lmms-eval, with its recall and yes-ratio."""
    share = _mean(rows, rows["gold"] == "yes")
    chances = {"precision": share, "recall": 0.5, "F1": share / (share + 0.5) if share else np.nan, "yes-ratio": np.nan}
    for name, interval in _yes_no_intervals(rows, lmms).items():
        yield _row(name, category, interval, rows, chances[name])


def _yes_no_intervals(rows: pd.DataFrame, lmms: bool) -> dict[str, Interval]:
    """Return precision, recall, F1 and yes-ratio with their intervals over images, NaN where one is undefined.

    The first two and the last are proportions of some of the answers. F1 follows from another one, the share J of the
    right yes in all answers that are yes or should be: F1 = 2 J / (1 + J), which grows with J, so that the ends of J's
    interval become those of F1's.
    """
    gold, said = (rows["gold"] == "yes").to_numpy(), (rows["parsed"] == "yes").to_numpy()
    # lmms-eval's recall leaves out answers that are neither yes nor no; a missing answer stays in it
    read = rows["parsed"].isin(YES_NO).to_numpy() | rows["answer"].isna().to_numpy()
    to_find = gold & read if lmms else gold
    right = (gold & said).astype(float)
    columns = [np.where(among, right, np.nan) for among in (said, to_find, said | to_find)]
    columns.append((gold if lmms else said).astype(float))  # and its yes-ratio is that of the labels
    precision, recall, both, ratio = mean_intervals(
        np.stack(columns, axis=1),
        kind="proportion",
        groups=rows["image_id"].tolist(),
        weights=rows["weight"].tolist(),
    )
    estimate, low, high = (2 * j / (1 + j) for j in (both.estimate, both.low, both.high))
    return {
        "precision": precision,
        "recall": recall,
        "F1": replace(both, estimate=estimate, low=low, high=high),
        "yes-ratio": ratio,
    }


def _f1_of_splits(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield LLaVA's mean F1 of POPE's three splits."""
    splits = sorted(part["category"].unique())
    if len(splits) == 3:
        parts = [_yes_no_intervals(part[part["category"] == split], lmms=False)["F1"] for split in splits]
        # the splits ask about the same images: their errors may all have the same sign, so their intervals are averaged
        estimate, low, high = (np.mean([getattr(p, name) for p in parts]) for name in ("estimate", "low", "high"))
        mean = replace(parts[0], estimate=float(estimate), low=float(low), high=float(high))
        yield _row("LLaVA: F1 of three splits", MEAN, replace(mean, few=any(p.few for p in parts)), part, np.nan)
