"""Accuracy by question type, before and after a change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.runs import Run
from workbench.stats import mean_interval, paired_test
from workbench.training_folder import MEAN


def change_by_type(samples: pd.DataFrame, *, seed: int) -> list[dict[str, Any]]:
    """Accuracy before and after, the drop between them and KL, for each question type and for the mean of types.

    Rows of one question (random draws of a change) are averaged first. Intervals are 95 %, over images, the drop's
    paired by question; where no answer changed it has the room that so many images leave. p is of the sign-flip test on
    the images' own drops. `few` says that fewer than 10 images were asked or fewer than 5 answers changed. In the mean
    of types every type weighs the same, however many questions it has.
    """
    scores = ["correct_before", "correct_after", "kl"]
    each = samples.groupby("id", sort=False).agg(
        {"image_id": "first", "category": "first", "chance": "first"} | dict.fromkeys(scores, "mean")
    )
    parts = [(str(name), part) for name, part in each.groupby("category")]
    return [_changed(name, part, seed) for name, part in [*parts, (MEAN, each)]]


def changes(found: Mapping[str, Run]) -> pd.DataFrame:
    """What an intervention changed in each model, as stored in the table `scores` of its run."""
    table = pd.concat([run.tables["scores"].assign(model=label) for label, run in found.items()], ignore_index=True)
    return table[["model", *(column for column in table.columns if column != "model")]]


def drops(table: pd.DataFrame) -> pd.DataFrame:
    """`changes` for a figure: score is the drop, to_chance the drop that would leave the answers at chance."""
    return (
        table.assign(to_chance=table["accuracy_before"] - table["chance"])
        .drop(columns="chance")
        .rename(columns={"accuracy_drop": "score"})
    )


def accuracy_by_type(samples: pd.DataFrame, *, seed: int) -> list[dict[str, Any]]:
    """Accuracy of each question type and of the mean of types, in which every type weighs the same, with a 95 %
    interval over images.

    Args:
        samples: one row per question: image_id, category, chance, correct.

    Returns:
        Rows with category, accuracy, low, high, few, chance, n (questions), n_images, seed. `few` says that there are
        fewer than 10 images, or fewer than 5 wrong (or right) answers: see `workbench.intervals`.
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
        named = {
            "category": name,
            "accuracy": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "few": interval.few,
        }
        level = chance.mean() if name == MEAN else chance[name]
        rows.append(named | {"chance": float(level), "n": len(part), "n_images": interval.n, "seed": seed})
    return rows


def _changed(category: str, each: pd.DataFrame, seed: int) -> dict[str, Any]:
    """A row of the table: see `change_by_type`."""
    scores = each[["correct_before", "correct_after", "kl", "chance"]].astype(float)
    shared = {"groups": each["image_id"].tolist(), "strata": each["category"].tolist()}
    drop = mean_interval(scores["correct_before"] - scores["correct_after"], kind="difference", **shared)
    kl = mean_interval(scores["kl"], kind="real", **shared)
    sizes = each["category"].map(each["category"].value_counts())
    weighted = scores.div(sizes * each["category"].nunique(), axis=0)  # so that sums are means of types
    by_image = weighted.groupby(each["image_id"])[["correct_before", "correct_after"]].sum()
    test = paired_test(by_image["correct_after"].to_numpy(), by_image["correct_before"].to_numpy(), n=2000, seed=seed)
    means = weighted.sum()
    return {
        **{"category": category, "accuracy_before": means["correct_before"], "accuracy_after": means["correct_after"]},
        **{"accuracy_drop": drop.estimate, "low": drop.low, "high": drop.high, "few": drop.few, "p": test.p},
        **{"kl": kl.estimate, "kl_low": max(kl.low, 0.0), "kl_high": kl.high},
        **{"n": len(each), "n_images": drop.n, "chance": means["chance"], "seed": seed},
    }


def kl_divergence(
    before: Float[Tensor, "question option"], after: Float[Tensor, "question option"]
) -> Float[Tensor, " question"]:
    """KL(before || after) in nats of log-probabilities that share their -inf; 0 where nothing moved."""
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0).sum(-1).clamp(min=0)
