"""Tables of a benchmark's scores, by scorer, from the answers of one model: each with interval, chance level and n.

Intervals are over images, or over pairs where a pair counts as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from workbench.benchmarks.scorers import LETTERED, YES_NO, Judged, by_likelihood, letter_of, reads_letters, scorers_of
from workbench.data.base import Sample
from workbench.data.mme import COGNITION, PERCEPTION
from workbench.intervals import Interval, mean_interval, mean_intervals, sum_interval
from workbench.scoring.tables import ALL as ALL
from workbench.training_folder import MEAN

LARGEST = 200  # score of a category of MME
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
    categories = [name for name in part["category"].unique() if name]
    subsets = [(name, part[part["category"] == name]) for name in categories] if len(categories) > 1 else []
    for name, rows in [(ALL, part), *subsets]:
        yield _accuracy_row("accuracy", name, rows)
    if part.groupby("id")["options"].nunique().max() > 1:
        yield _circular(part)
    if reads_letters(benchmark, scorer):
        yield from _letter_rates(part)
    if subsets:
        yield _accuracy_row("accuracy", MEAN, part, "category")
    if set(part["gold"]) <= set(YES_NO):
        for name, rows in [(ALL, part), *subsets]:
            yield from _yes_no_rows(rows, name, benchmark == "pope" and scorer == "lmms")
    yield from _SPECIAL.get(benchmark.split()[0] if benchmark else "", lambda _: ())(part)


def _row(
    measure: str,
    category: str,
    interval: Interval,
    rows: pd.DataFrame,
    chance: float | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    return {
        "measure": measure,
        "category": category,
        "score": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "few": interval.few,
        "chance": _mean(rows, "chance") if chance is None else chance,
        "majority": np.nan,
        "unparsed": int(rows["parsed"].isna().sum()),
        "n": rows["id"].nunique() if n is None else n,
        "n_images": rows["image_id"].nunique(),
        "draws": rows["draw"].nunique(),
    }


def _accuracy_row(measure: str, category: str, rows: pd.DataFrame, strata: str | None = None) -> dict[str, Any]:
    """Return an accuracy beside its chance level and that of the most frequent answers; `strata` as in `_accuracy`."""
    levels = {"chance": _mean(rows, "chance", strata), "majority": _mean(rows, "by_majority", strata)}
    return _row(measure, category, _accuracy(rows, strata), rows) | levels


def _mean(rows: pd.DataFrame, column: str, strata: str | None = None) -> float:
    """Return the mean of a column over questions; with the column `strata`, the mean of their means."""
    by = [""] * len(rows) if strata is None else rows[strata].tolist()
    sums = pd.DataFrame({"value": rows[column] * rows["weight"], "weight": rows["weight"]}).groupby(by).sum()
    return float((sums["value"] / sums["weight"]).mean())


def _accuracy(rows: pd.DataFrame, strata: str | None = None, correct: pd.Series | None = None) -> Interval:
    """Return the accuracy with its interval over images; with the column `strata`, the mean of their accuracies.

    Args:
        rows: judged answers.
        strata: a column.
        correct: what to average instead of the column `correct`.
    """
    questions = by_question(rows if correct is None else rows.assign(correct=correct))
    return mean_interval(
        questions["correct"],
        kind="proportion",
        groups=questions["image_id"].tolist(),
        strata=None if strata is None else questions[strata].tolist(),
    )


def by_question(rows: pd.DataFrame) -> pd.DataFrame:
    """Return judged answers with `correct` as a number, averaged over the draws of each question."""
    rows = rows.assign(correct=rows["correct"].astype(float))
    if rows["draw"].nunique() == 1:
        return rows
    return rows.assign(correct=rows.groupby("id")["correct"].transform("mean")).drop_duplicates("id")


def complete(rows: pd.DataFrame, column: str, size: int) -> pd.DataFrame:
    """Return the answers of complete groups: those of which all questions are there, in each draw.

    Args:
        rows: judged answers.
        column: names the group of a question, such as `pair`; "" is none.
        size: number of questions of a group.
    """
    rows = rows[rows[column] != ""]
    return rows[rows.groupby([column, "draw"])["id"].transform("nunique") == size]


def _circular(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the share of questions that are answered right with every rotation of their options.

    This is the circular evaluation of VLMEvalKit, which none of the benchmarks here has as its own score.
    """
    questions = rows.groupby("id", sort=False).agg(
        right=("correct", "all"), chance=("chance", "prod"), image_id=("image_id", "first")
    )
    interval = mean_interval(questions["right"].astype(float), kind="proportion", groups=questions["image_id"].tolist())
    return _row("circular", ALL, interval, rows, float(questions["chance"].mean()))


def _letter_rates(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield how often each letter is answered, beside how often it is right as `chance`."""
    golds = _gold_letters(rows)
    for letter in sorted({*golds, *rows["parsed"].dropna()}):
        interval = _accuracy(rows, correct=(rows["parsed"] == letter).astype(float))
        yield _row(f"rate of {letter}", ALL, interval, rows, _mean(rows.assign(right=golds == letter), "right"))


def _gold_letters(rows: pd.DataFrame) -> pd.Series:
    return pd.Series([letter_of(_sample(row)) for row in rows.to_dict("records")], index=rows.index)


def _by_majority(rows: pd.DataFrame, benchmark: str) -> pd.Series:
    """Return whether the right answer is its category's most frequent one: as a letter, where answers are letters.

    The categories of What's Up are the right answers, so there it is the most frequent one of all questions.
    """
    golds = _gold_letters(rows) if benchmark in LETTERED else rows["gold"]
    categories = rows["category"] if not benchmark.startswith("whatsup") else pd.Series("", rows.index)
    counts = rows["weight"].groupby([categories, golds]).sum()
    most = {str(category): of.droplevel(0).idxmax() for category, of in counts.groupby(level=0)}
    return golds == categories.map(most)


# --- ratios of counts -----------------------------------------------------------------------------


def _yes_no_rows(rows: pd.DataFrame, category: str, lmms: bool) -> Iterator[dict[str, Any]]:
    """Yield precision, recall, F1 and the share of yes; for POPE by lmms-eval, with its recall and yes-ratio."""
    share = _mean(rows.assign(yes=rows["gold"] == "yes"), "yes")
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


# --- averages of single benchmarks ----------------------------------------------------------------


def _pope(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the paper's mean accuracy of random and popular, and LLaVA's mean F1 of three splits."""
    two = part[part["category"].isin(["random", "popular"])]
    if two["category"].nunique() == 2:
        yield _accuracy_row("paper: random and popular", MEAN, two, "category")
    splits = sorted(part["category"].unique())
    if len(splits) == 3:
        parts = [_yes_no_intervals(part[part["category"] == split], lmms=False)["F1"] for split in splits]
        # the splits ask about the same images: their errors may all have the same sign, so their intervals are averaged
        estimate, low, high = (np.mean([getattr(p, name) for p in parts]) for name in ("estimate", "low", "high"))
        mean = replace(parts[0], estimate=float(estimate), low=float(low), high=float(high))
        yield _row("LLaVA: F1 of three splits", MEAN, replace(mean, few=any(p.few for p in parts)), part, np.nan)


def _mmvp(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    yield from _groups(part, "pair", 2, "pair")


def _whatsup(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    if (part["pair"] != "").all():
        yield from _groups(part, "pair", 2, "pair")
        yield from _groups(part, "source", 4, "set")


def _groups(part: pd.DataFrame, column: str, size: int, measure: str) -> Iterator[dict[str, Any]]:
    """Yield the share of complete groups, such as pairs, of which every answer is right."""
    whole = complete(part, column, size)
    if whole.empty:
        return
    drawn = whole.groupby([column, "draw"])
    chance = float(drawn["chance"].prod().mean())
    right = drawn["correct"].all().astype(float).groupby(column).mean()
    yield _row(measure, ALL, mean_interval(right, kind="proportion"), whole, chance, len(right))


def _mme(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield MME's scores: of each category (at most 200), their sums over perception and cognition, and the total."""
    whole = complete(part, "pair", 2)
    if whole.empty:
        return
    drawn = whole.groupby(["pair", "draw"], sort=False).agg(
        category=("category", "first"),
        image_id=("image_id", "first"),
        right=("correct", "mean"),
        chance=("chance", "mean"),
    )
    drawn["score"] = 100 * (drawn["right"] + (drawn["right"] == 1))
    images = drawn.groupby("pair", sort=False).agg(
        dict.fromkeys(["category", "image_id"], "first") | dict.fromkeys(["chance", "score"], "mean")
    )
    images["by_chance"] = 100 * (images["chance"] + images["chance"] ** 2)
    known = [name for name in (*PERCEPTION, *COGNITION) if name in set(images["category"])]
    sums = {"perception": PERCEPTION, "cognition": COGNITION, "total": (*PERCEPTION, *COGNITION)}
    for measure, names in [*((name, (name,)) for name in known), *sums.items()]:
        rows = images[images["category"].isin(names)]
        if rows.empty:
            continue
        count = rows["category"].nunique()
        share = mean_interval(
            rows["score"] / LARGEST,
            kind="proportion",
            groups=rows["image_id"].tolist(),
            strata=rows["category"].tolist(),
        )
        chance = count * float(rows.groupby("category")["by_chance"].mean().mean())
        estimate, low, high = (LARGEST * count * value for value in (share.estimate, share.low, share.high))
        scaled = Interval(estimate, low, high, share.n, share.level, share.few)
        asked = whole[whole["category"].isin(names)]
        of_category = measure in known
        yield _row(
            "MME score" if of_category else f"MME {measure}", measure if of_category else ALL, scaled, asked, chance
        )


def _cv_bench(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield CV-Bench's averages: `paper` over rows, `official` over the sources of the images."""
    flat = part[part["category"].isin(["Count", "Relation"])]
    deep = part[part["source"] == "Omni3D"]
    if len(flat):
        yield _accuracy_row("paper: 2D", ALL, flat)
    if set(flat["source"]) == {"ADE20K", "COCO"}:
        yield _accuracy_row("official: 2D", ALL, flat, "source")
    if len(deep):
        yield _accuracy_row("official: 3D", ALL, deep)
    if {"ADE20K", "COCO", "Omni3D"} <= set(part["source"]):
        shares = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}
        of = {source: part[part["source"] == source] for source in shares}
        total = sum_interval([_accuracy(rows) for rows in of.values()], list(shares.values()))
        chance, majority = (
            sum(share * _mean(of[source], column) for source, share in shares.items())
            for column in ("chance", "by_majority")
        )
        yield _row("official: total", ALL, total, part, chance) | {"majority": majority}


def _mmstar(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the mean over subcategories, which lmms-eval reports."""
    yield _accuracy_row("l2 mean", ALL, part, "source")


_SPECIAL: Mapping[str, Callable[[pd.DataFrame], Iterator[dict[str, Any]]]] = {
    "cv_bench": _cv_bench,
    "mme": _mme,
    "mmstar": _mmstar,
    "mmvp": _mmvp,
    "pope": _pope,
    "whatsup": _whatsup,
}
