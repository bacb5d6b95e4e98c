"""What stored runs say about a model, to read one image by: heads that were ranked, and scores of other images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.dashboard.site import Site
from workbench.errors import RunError
from workbench.looking import NEIGHBORS, Alignment

POINTING = {"layer", "head", "pointing", "low", "high", "null_mean", "p_holm", "n_images", "n"}


@dataclass(frozen=True)
class Head:
    """An attention head that points at the object of a question, chosen on one half of the images of a stored run.

    Attributes:
        share: of the questions about the other half, those at whose object it looks most; low and high are its interval
            over images.
        others: the same with objects of other images.
        p: of a paired test of the two, corrected for the number of chosen heads.
    """

    layer: int
    head: int
    share: float
    low: float
    high: float
    others: float
    p: float
    questions: int
    images: int
    data: str


def ranked_heads(site: Site, key: str) -> list[Head]:
    """Return the heads of a model that its newest stored run of `attention` chose, the best of the choosing half first.

    Runs that read other positions than the end of the question, or objects of no kind, rank none.
    """
    for (run,) in site.stored.of("attention", [key]):
        try:
            table = run.table("heads")
        except RunError:
            continue
        if set(table) >= POINTING and len(table) and run.record["config"].get("positions", "prompt") == "prompt":
            data = str(run.record.get("data", ""))
            return [
                Head(
                    int(row["layer"]),
                    int(row["head"]),
                    row["pointing"],
                    row["low"],
                    row["high"],
                    row["null_mean"],
                    row["p_holm"],
                    int(row["n"]),
                    int(row["n_images"]),
                    data,
                )
                for row in table.to_dict("records")
            ]
    return []


@dataclass(frozen=True)
class Spread:
    """Where one image lies among those of a stored run, in each layer.

    Attributes:
        low: of the middle 90 % of images.
        high: of the middle 90 % of images.
        below: the share of images whose score is lower.
        images: their number.
        data: what they are of.
    """

    low: Sequence[float]
    high: Sequence[float]
    below: Sequence[float]
    images: int
    data: str


def spread_of(site: Site, key: str, vfm: str, aligned: Alignment) -> Spread | None:
    """Return where an image's CKNNA lies among that of the images of the newest stored run with the same VFM and k."""
    for (run,) in site.stored.of("cknna", [key]):
        config = run.record["config"]
        if (config.get("metric"), config.get("pooling"), config.get("k")) != ("cknna", "within", NEIGHBORS):
            continue
        try:
            table = run.table("per_image")
        except RunError:
            continue
        if not {"vfm", "vfm_layer", "layer", "image_id", "score"} <= set(table):
            continue
        table = table[(table["vfm"] == vfm) & table["vfm_layer"].isna()]
        by_layer: dict[int, pd.Series] = {int(layer): part for layer, part in table.groupby("layer")["score"]}
        scores = [by_layer.get(layer) for layer in range(len(aligned.scores))]
        if any(part is None for part in scores):
            continue
        pairs = [(part, score) for part, score in zip(scores, aligned.scores, strict=True) if part is not None]
        return Spread(
            [float(part.quantile(0.05)) for part, _ in pairs],
            [float(part.quantile(0.95)) for part, _ in pairs],
            [float((part < score).mean()) for part, score in pairs],
            int(table["image_id"].nunique()),
            str(run.record.get("data", "")),
        )
    return None
