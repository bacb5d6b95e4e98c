"""Tables of accuracy by question type, and of how an intervention changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from workbench.intervals import mean_interval
from workbench.paired import differences_on_shared, paired_test, sums_interval
from workbench.runs import Run
from workbench.training_folder import MEAN

ALL = "all questions"


def change_by_type(samples: pd.DataFrame, *, seed: int) -> list[dict[str, Any]]:
    """Return accuracy before and after an intervention, the accuracy drop and KL, by question type and for their mean.

    Several rows of one question (random draws of an intervention) are averaged first. Intervals are 95 % intervals over
    images; the drop's is paired by question, and where no answer changed it still has the width that so many images
    leave. p is that of a sign-flip test on the drops of images. `few` is true where fewer than 10 images were asked, or
    fewer than 5 answers changed. In the mean of types, every type has the same weight, however many questions it has.

    Args:
        samples: rows of `Quiz.scored`.
        seed: seed of the sign-flip test.
    """
    scores = ["correct_before", "correct_after", "kl"]
    questions = samples.groupby("id", sort=False).agg(
        {"image_id": "first", "category": "first", "chance": "first"} | dict.fromkeys(scores, "mean")
    )
    parts = [(str(name), part) for name, part in questions.groupby("category")]
    return [_change_row(name, part, seed) for name, part in [*parts, (MEAN, questions)]]


def counts_by_type(samples: pd.DataFrame, *, seed: int) -> list[dict[str, Any]]:
    """Return how many answers are right before and after an intervention, and the drop in % of those before.

    This is how the paper reports its permutation (Table 3). Random draws are averaged first.

    Args:
        samples: rows of `Quiz.scored`.
        seed: of the interval of the drop, which resamples images. Where few answers changed it also includes that of
            the difference of accuracies, divided by the accuracy before: no sample of unchanged answers shows a drop.

    Returns:
        Rows for each question type and for all questions: category, right_before, right_after, drop_percent (NaN where
        nothing was right), low, high, few, n, n_images, seed.
    """
    questions = samples.groupby("id", sort=False).agg(
        dict.fromkeys(["image_id", "category"], "first") | dict.fromkeys(["correct_before", "correct_after"], "mean")
    )
    parts = [(str(name), part) for name, part in questions.groupby("category")]
    rows = []
    for name, part in [*parts, (ALL, questions)] if len(parts) != 1 else parts:
        counts = {column: part[column].to_numpy(dtype=float) for column in ("correct_before", "correct_after")}
        drop = sums_interval(
            part["image_id"],
            counts,
            lambda s: 100 * (s["correct_before"] - s["correct_after"]) / s["correct_before"],
            seed,
        )
        before = float(counts["correct_before"].mean())
        difference = mean_interval(
            counts["correct_before"] - counts["correct_after"], kind="difference", groups=part["image_id"].tolist()
        )
        if difference.few and before:
            low, high = (100 * end / before for end in (difference.low, difference.high))
            drop = replace(drop, low=min(drop.low, low), high=max(drop.high, high), few=True)
        row = {"category": name, "right_before": counts["correct_before"].sum()}
        row |= {"right_after": counts["correct_after"].sum(), "drop_percent": drop.estimate}
        row |= {"low": drop.low, "high": drop.high, "few": drop.few}
        rows.append(row | {"n": len(part), "n_images": drop.n, "seed": seed})
    return rows


def changes(compared: Mapping[str, Run]) -> pd.DataFrame:
    """Return the tables `scores` of several runs as one, with the column `model` (the run's label) first."""
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in compared.items()], ignore_index=True)
    return table[["model", *(column for column in table.columns if column != "model")]]


def drops(table: pd.DataFrame) -> pd.DataFrame:
    """Return `changes` for a figure: `score` is the accuracy drop, `to_chance` the drop that ends at chance."""
    return (
        table.assign(to_chance=table["accuracy_before"] - table["chance"])
        .drop(columns="chance")
        .rename(columns={"accuracy_drop": "score"})
    )


def drop_by_image(samples: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return one accuracy drop for each image, whose mean over images is the mean of question types.

    It is that mean plus the image's first-order effect on it (as in `workbench.paired.values_by_unit`): an image with
    many questions has no larger drop for that alone. Several rows of one question (random draws of an intervention) are
    averaged first.

    Args:
        samples: rows of `Quiz.scored`.
        by: columns; there is a drop for each combination of their values.

    Returns:
        Columns `by`, image_id and value.
    """
    columns, drop = list(by), samples["correct_before"].astype(float) - samples["correct_after"].astype(float)
    questions = (
        samples.assign(drop=drop)
        .groupby([*columns, "id"], sort=False)
        .agg(drop=("drop", "mean"), image_id=("image_id", "first"), category=("category", "first"))
        .reset_index()
    )
    of_type, asked = questions.groupby([*columns, "category"])["drop"], questions.groupby(columns)
    effect = (questions["drop"] - of_type.transform("mean")) / of_type.transform("size")
    effect *= asked["image_id"].transform("nunique") / asked["category"].transform("nunique")
    effects = questions.assign(value=effect).groupby([*columns, "image_id"], sort=False)["value"].sum().reset_index()
    means = of_type.mean().groupby(level=columns).mean().rename("mean").reset_index()  # every type has the same weight
    table = effects.merge(means, on=columns)
    return table.assign(value=table["value"] + table["mean"]).drop(columns="mean")


def drop_differences(
    runs: Mapping[str, Run], select: Callable[[pd.DataFrame], pd.Series], by: Sequence[str], within: Sequence[str] = ()
) -> pd.DataFrame:
    """Subtract the accuracy drop of the first model from that of every other, on the questions that both were asked.

    Models whose runs have other data, options or version than the first one's are left out.

    Args:
        runs: {model: run with a table `samples`, the rows of `Quiz.scored`}.
        select: table of samples -> which rows count.
        by: columns; there is a difference for each combination of their values.
        within: columns of `by`; Holm's correction is made separately for each combination of their values.

    Returns:
        `workbench.paired.paired_differences`; intervals are over images, for these very models.
    """
    first = next(iter(runs.values()))
    samples = {label: run.tables["samples"] for label, run in runs.items() if _question(run) == _question(first)}
    selected = {label: table[select(table)] for label, table in samples.items()}

    def on_shared(reference: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        shared = set(reference["id"]) & set(other["id"])
        a, b = (drop_by_image(table[table["id"].isin(shared)], by) for table in (reference, other))
        return a, b

    return differences_on_shared(selected, on_shared, by=by, within=within)


def _question(run: Run) -> tuple[object, ...]:
    return run.record["version"], run.record["data_fingerprint"], run.record["config"]


def accuracy_by_type(samples: pd.DataFrame, *, seed: int) -> list[dict[str, Any]]:
    """Return the accuracy of each question type and its mean over types, with 95 % intervals over images.

    In the mean, every type has the same weight.

    Args:
        samples: one row per question: image_id, category, chance, correct.
        seed: stored in the rows.

    Returns:
        Rows with category, accuracy, low, high, few, chance, n (questions), n_images, seed. `few` is true where there
        are fewer than 10 images, or fewer than 5 wrong (or right) answers: see `workbench.intervals`.
    """
    rows: list[dict[str, Any]] = []
    chance = samples.groupby("category")["chance"].mean()
    for name, part in [*samples.groupby("category"), (MEAN, samples)]:
        interval = mean_interval(
            part["correct"].astype(float),
            kind="proportion",
            groups=part["image_id"].tolist(),
            strata=part["category"].tolist(),
        )
        row = {
            "category": name,
            "accuracy": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "few": interval.few,
        }
        level = chance.mean() if name == MEAN else chance[name]
        rows.append(row | {"chance": float(level), "n": len(part), "n_images": interval.n, "seed": seed})
    return rows


def _change_row(category: str, questions: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return a row of `change_by_type`, from one row per question."""
    scores = questions[["correct_before", "correct_after", "kl", "chance"]].astype(float)
    grouping = {"groups": questions["image_id"].tolist(), "strata": questions["category"].tolist()}
    drop = mean_interval(scores["correct_before"] - scores["correct_after"], kind="difference", **grouping)
    kl = mean_interval(scores["kl"], kind="real", **grouping)
    sizes = questions["category"].map(questions["category"].value_counts())
    weighted = scores.div(sizes * questions["category"].nunique(), axis=0)  # so that sums are means over types
    by_image = weighted.groupby(questions["image_id"])[["correct_before", "correct_after"]].sum()
    test = paired_test(by_image["correct_after"].to_numpy(), by_image["correct_before"].to_numpy(), n=2000, seed=seed)
    means = weighted.sum()
    lowest = 0.0 if (scores["kl"] >= 0).all() else -np.inf  # a difference of two KL can be negative
    return {
        **{"category": category, "accuracy_before": means["correct_before"], "accuracy_after": means["correct_after"]},
        **{"accuracy_drop": drop.estimate, "low": drop.low, "high": drop.high, "few": drop.few, "p": test.p},
        **{"kl": kl.estimate, "kl_low": max(kl.low, lowest), "kl_high": kl.high},
        **{"n": len(questions), "n_images": drop.n, "chance": means["chance"], "seed": seed},
    }
