"""One score of each benchmark, the mean of several, and the same under resampling of the images.

A benchmark's score is the one that the paper reports, as a share from 0 to 1: CV-Bench the accuracy on its 2D
questions, MMVP pairs, POPE the mean accuracy of random and popular, MME its total as a share of the largest possible
one, What's Up the mean accuracy of the subsets that are asked, and any other data set the accuracy of all questions.
Where the questions do not allow this score (a single split of POPE), it is the accuracy of all questions, and the name
of the score says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.benchmarks.means import GROUP, LARGEST, means
from workbench.data.pope import is_repope
from workbench.scoring.tables import ALL
from workbench.training_folder import MEAN

HEADLINES: Mapping[str, tuple[str, str]] = {  # name of the benchmark: measure and category in `tables.scores`
    "cv_bench": ("paper: 2D", ALL),
    "mme": ("MME total", ALL),
    "mmvp": ("pair", ALL),
    "pope": ("paper: random and popular", MEAN),
}


@dataclass(frozen=True)
class Headline:
    """A benchmark's score as a share, with its interval and its chance level.

    Attributes:
        name: of the score, such as "pope, random and popular".
    """

    name: str
    score: float
    low: float
    high: float
    chance: float
    n: int
    n_images: int


def headline(scores: pd.DataFrame, benchmark: str, data: str, labels: str = "") -> Headline:
    """Return a benchmark's score from the table of all its scores.

    Args:
        scores: `tables.scores` of one scorer and one thing shown.
        benchmark: its name, with that of the subset; "" if the data set is none.
        data: name of the data set, for one that is no benchmark.
        labels: their version; the name of the score says if they are RePOPE's.
    """
    name = "RePOPE" if is_repope(labels) else benchmark or data
    measure, category = HEADLINES.get(benchmark, ("accuracy", ALL))
    rows = scores[(scores["measure"] == measure) & (scores["category"] == category)]
    if rows.empty:
        measure = "accuracy"
        rows = scores[(scores["measure"] == measure) & (scores["category"] == ALL)]
    row, largest, words = rows.iloc[0], 1, measure.removeprefix("paper: ")
    if measure == "MME total":
        largest, words = LARGEST * int((scores["measure"] == "MME score").sum()), "share of the largest total"
    score, low, high, chance = (float(row[column]) / largest for column in ("score", "low", "high", "chance"))
    return Headline(f"{name}, {words}", score, low, high, chance, int(row["n"]), int(row["n_images"]))


def units(judged: pd.DataFrame) -> pd.DataFrame:
    """Return the values whose mean within each stratum, averaged over strata, is the score that `headline` names.

    Args:
        judged: answers of one scorer, as `tables.judged` gives them.

    Returns:
        The values of `means.Mean`.
    """
    by_name = means(judged)
    name = HEADLINES.get(str(judged["benchmark"].iloc[0]), ("accuracy", ALL))
    return by_name.get(name, by_name["accuracy", ALL]).values


def number_of_images(values: pd.DataFrame) -> int:
    """Return how many different images `units` of one or several data sets are about."""
    clusters = pd.Series(values["cluster"].unique())
    return len(clusters) + int(clusters.str.startswith(GROUP).sum())


def weights_of(names: Sequence[str]) -> dict[str, Float[np.ndarray, " data"]]:
    """Return the weight of each data set in the mean of each benchmark, and of all.

    Args:
        names: the benchmark of each data set; several subsets of one benchmark count as one, by their mean.

    Returns:
        {benchmark: weights that sum to 1}, and under "" those of the mean of all benchmarks.
    """
    weights = {name: np.array([n == name for n in names]) / names.count(name) for name in dict.fromkeys(names)}
    return weights | {"": np.mean(list(weights.values()), axis=0)}


def mean_of(
    parts: Sequence[Headline], weights: Float[np.ndarray, " data"], spread: np.ndarray, n_images: int
) -> Headline:
    """Return the weighted mean of scores; its interval is the wider of two, on either side.

    One is made from the intervals of the parts as if they were independent (Zou and Donner 2008, Stat. Med. 27, 1693:
    the distances from the estimates add up as squares), which is right where nothing varies, as when all answers are
    wrong. The other one has the percentiles of the mean over resampled images, for data sets that share images.

    Args:
        parts: the score of each data set.
        weights: of each data set, 0 for one that does not count.
        spread: the mean in each resample.
        n_images: how many different images were asked about; the data sets may share some.
    """
    score, low, high, chance = (
        np.array([getattr(part, column) for part in parts]) for column in ("score", "low", "high", "chance")
    )
    mean = float(weights @ score)
    below, above = (float(np.sqrt((weights**2 * (score - edge) ** 2).sum())) for edge in (low, high))
    drawn = np.quantile(spread, [0.025, 0.975]) if len(spread) else [mean, mean]
    counted = [part for part, weight in zip(parts, weights, strict=True) if weight]
    return Headline(
        "mean",
        mean,
        max(0.0, min(mean - below, float(drawn[0]))),
        min(1.0, max(mean + above, float(drawn[1]))),
        float(weights @ chance),
        sum(part.n for part in counted),
        n_images,
    )


def weighted(
    drawn: Float[np.ndarray, "*resample data"], weights: Float[np.ndarray, " data"]
) -> Float[np.ndarray, "*resample"]:
    """Return a weighted mean of data sets in each resample: NaN where one of them has no score; others do not count."""
    counted = weights > 0
    return np.asarray(drawn[..., counted] @ weights[counted])


def resampled(
    values: pd.DataFrame, steps: Sequence[int], *, draws: int, seed: int
) -> Float[np.ndarray, "draw step data"]:
    """Return the score of every data set at every step under resampling of clusters, which are images or pairs.

    A resample is the same for all steps and data sets, and for every model that was asked the same questions with the
    same seed. An image that several data sets share is drawn for all of them together.

    Args:
        values: columns data (number of the data set), step, and those of `units`.
        steps: the steps, in order.
        draws: number of resamples.
        seed: their seed.

    Returns:
        NaN where a resample has no value of a data set; one that has no value of a stratum has the mean of the others.
    """
    clusters, cluster = np.unique(values["cluster"].to_numpy(str), return_inverse=True)
    strata = values[["data", "stratum"]].drop_duplicates().sort_values(["data", "stratum"]).reset_index(drop=True)
    stratum = pd.MultiIndex.from_frame(strata).get_indexer(pd.MultiIndex.from_frame(values[["data", "stratum"]]))
    step = pd.Index(steps).get_indexer(values["step"])
    sums, counts = np.zeros((2, len(clusters), len(steps), len(strata)))
    np.add.at(sums, (cluster, step, stratum), values["value"].to_numpy())
    np.add.at(counts, (cluster, step, stratum), 1.0)
    weights = np.random.default_rng(seed).multinomial(
        len(clusters), np.full(len(clusters), 1 / len(clusters)), size=draws
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.tensordot(weights, sums, 1) / np.tensordot(weights, counts, 1)
    numbers = strata["data"].to_numpy()
    return np.stack([_mean_of_defined(means[..., numbers == number]) for number in np.unique(numbers)], axis=-1)


def _mean_of_defined(values: Float[np.ndarray, "*resample stratum"]) -> Float[np.ndarray, "*resample"]:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0).sum(axis=-1) / defined.sum(axis=-1))
