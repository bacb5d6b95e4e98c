"""The scores of a benchmark that are means: of questions, pairs or sets, over all of them or first within strata.

Each is defined here alone. Its table has its interval, a comparison of two models the interval of its paired
difference, and a training curve its values under resampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from workbench.data.mme import COGNITION, PERCEPTION
from workbench.intervals import Interval, Kind, mean_interval, sum_interval
from workbench.scoring.tables import ALL
from workbench.training_folder import MEAN

LARGEST = 200  # score of a category of MME
GROUP = "pair "  # begins the name of a cluster of several images; the hash of an image has no space
VALUES = ("unit", "cluster", "stratum", "value")


@dataclass(frozen=True)
class Mean:
    """A score that is a mean.

    Attributes:
        measure, category: its name.
        rows: the judged answers that count in it.
        values: columns unit (the question, pair or set), cluster (the image, or the pair where a pair counts as one),
            stratum and value, from 0 to 1. The score is the mean within each stratum, averaged over strata.
        strata: the column of `rows` with the strata, "" for one alone.
        shares: weight of each stratum; empty if they are equal.
        scale: the score of units whose values are all 1.
        chance: of the score; None if it is the mean over the questions, as the score is.
        n: how many questions, pairs or sets there are.
    """

    measure: str
    category: str
    rows: pd.DataFrame
    values: pd.DataFrame
    strata: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1
    chance: float | None = None
    n: int = 0

    def interval(self, values: pd.DataFrame | None = None, kind: Kind = "proportion") -> Interval:
        """Return the score, or the same mean of other values of these units, with its interval over clusters.

        Args:
            values: columns as those of `values`.
            kind: what they are.
        """
        values = self.values if values is None else values
        if self.shares:
            parts = [_interval(values[values["stratum"] == stratum], kind) for stratum in self.shares]
            interval = sum_interval(parts, list(self.shares.values()))
        else:
            interval = _interval(values, kind)
        scaled = {name: self.scale * getattr(interval, name) for name in ("estimate", "low", "high")}
        return replace(interval, **scaled)

    def level(self, column: str) -> float:
        """Return the same mean of a column of the answers, such as their chance level; every question counts once."""
        by = self.rows[self.strata].tolist() if self.strata else [""] * len(self.rows)
        weight = 1 / self.rows.groupby("id")["id"].transform("size")
        sums = pd.DataFrame({"value": self.rows[column] * weight, "weight": weight}).groupby(by).sum()
        means = sums["value"] / sums["weight"]
        return float((means * pd.Series(self.shares)).sum() if self.shares else means.mean())


def means(judged: pd.DataFrame) -> dict[tuple[str, str], Mean]:
    """Return all scores of a benchmark that are means, by measure and category.

    Args:
        judged: answers of one scorer, as `tables.judged` gives them.
    """
    benchmark = str(judged["benchmark"].iloc[0])
    special = _SPECIAL.get(benchmark.split()[0] if benchmark else "", lambda _: iter(()))
    return {(mean.measure, mean.category): mean for mean in (*_common(judged), *special(judged))}


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


def _interval(values: pd.DataFrame, kind: Kind) -> Interval:
    several = values["stratum"].nunique() > 1
    return mean_interval(
        values["value"],
        kind=kind,
        groups=values["cluster"].tolist(),
        strata=values["stratum"].tolist() if several else None,
    )


def _questions(
    measure: str, category: str, rows: pd.DataFrame, strata: str = "", shares: Mapping[str, float] | None = None
) -> Mean:
    """Return the accuracy of some questions; with the column `strata`, the mean of their accuracies."""
    each = by_question(rows)
    values = _values(each["id"], each["image_id"], each[strata] if strata else "", each["correct"])
    return Mean(measure, category, rows, values, strata, shares or {}, n=len(values))


def _values(unit: pd.Series, cluster: pd.Series, stratum: pd.Series | str, value: pd.Series) -> pd.DataFrame:
    columns = (unit, cluster, stratum, value.astype(float))
    return pd.DataFrame(dict(zip(VALUES, columns, strict=True))).reset_index(drop=True)


def _common(part: pd.DataFrame) -> Iterator[Mean]:
    """Yield the accuracy: of all questions, of each category, and the mean of these; and that of rotated options."""
    yield _questions("accuracy", ALL, part)
    categories = [name for name in part["category"].unique() if name]
    if len(categories) > 1:
        yield _questions("accuracy", MEAN, part, "category")
        for name in categories:
            yield _questions("accuracy", str(name), part[part["category"] == name])
    if part.groupby("id")["options"].nunique().max() > 1:
        yield _circular(part)


def _circular(part: pd.DataFrame) -> Mean:
    """Return the share of questions that are answered right with every rotation of their options.

    This is the circular evaluation of VLMEvalKit, which none of the benchmarks here has as its own score.
    """
    each = part.groupby("id", sort=False).agg(
        right=("correct", "all"), chance=("chance", "prod"), image_id=("image_id", "first")
    )
    values = _values(each.index.to_series(), each["image_id"], "", each["right"])
    return Mean("circular", ALL, part, values, chance=float(each["chance"].mean()), n=len(values))


def _pope(part: pd.DataFrame) -> Iterator[Mean]:
    """Yield the paper's mean accuracy of random and popular."""
    two = part[part["category"].isin(["random", "popular"])]
    if two["category"].nunique() == 2:
        yield _questions("paper: random and popular", MEAN, two, "category")


def _mmvp(part: pd.DataFrame) -> Iterator[Mean]:
    yield from _groups(part, "pair", 2, "pair")


def _whatsup(part: pd.DataFrame) -> Iterator[Mean]:
    if (part["pair"] != "").all():
        yield from _groups(part, "pair", 2, "pair")
        yield from _groups(part, "source", 4, "set")


def _groups(part: pd.DataFrame, column: str, size: int, measure: str) -> Iterator[Mean]:
    """Yield the share of complete groups, such as pairs, of which every answer is right."""
    whole = complete(part, column, size)
    if whole.empty:
        return
    drawn = whole.groupby([column, "draw"])
    right = drawn["correct"].all().astype(float).groupby(column).mean()
    names = right.index.to_series()
    values = _values(names, GROUP + names, "", right)
    yield Mean(measure, ALL, whole, values, chance=float(drawn["chance"].prod().mean()), n=len(values))


def _mme(part: pd.DataFrame) -> Iterator[Mean]:
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
    drawn["score"] = (drawn["right"] + (drawn["right"] == 1)) / 2
    pairs = drawn.groupby("pair", sort=False).agg(
        dict.fromkeys(["category", "image_id"], "first") | dict.fromkeys(["chance", "score"], "mean")
    )
    pairs["by_chance"] = (pairs["chance"] + pairs["chance"] ** 2) / 2
    known = [name for name in (*PERCEPTION, *COGNITION) if name in set(pairs["category"])]
    sums = {"perception": PERCEPTION, "cognition": COGNITION, "total": (*PERCEPTION, *COGNITION)}
    for measure, names in [*((name, (name,)) for name in known), *sums.items()]:
        some = pairs[pairs["category"].isin(names)]
        if some.empty:
            continue
        scale = LARGEST * some["category"].nunique()
        asked = whole[whole["category"].isin(names)]
        one = measure in known
        yield Mean(
            "MME score" if one else f"MME {measure}",
            measure if one else ALL,
            asked,
            _values(some.index.to_series(), some["image_id"], some["category"], some["score"]),
            scale=scale,
            chance=scale * float(some.groupby("category")["by_chance"].mean().mean()),
            n=asked["id"].nunique(),
        )


def _cv_bench(part: pd.DataFrame) -> Iterator[Mean]:
    """Yield CV-Bench's averages: `paper` over rows, `official` over the sources of the images.

    Those of 2D need both of its tasks; the accuracy of one alone is that of a category.
    """
    flat = part[part["category"].isin(["Count", "Relation"])]
    deep = part[part["source"] == "Omni3D"]
    both = flat["category"].nunique() == 2
    if both:
        yield _questions("paper: 2D", ALL, flat)
    if both and set(flat["source"]) == {"ADE20K", "COCO"}:
        yield _questions("official: 2D", ALL, flat, "source")
    if len(deep):
        yield _questions("official: 3D", ALL, deep)
    shares = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}
    if both and set(shares) <= set(part["source"]):
        yield _questions("official: total", ALL, part[part["source"].isin(shares)], "source", shares)


def _mmstar(part: pd.DataFrame) -> Iterator[Mean]:
    """Yield the mean over subcategories, which lmms-eval reports."""
    yield _questions("l2 mean", ALL, part, "source")


_SPECIAL: Mapping[str, Callable[[pd.DataFrame], Iterator[Mean]]] = {
    "cv_bench": _cv_bench,
    "mme": _mme,
    "mmstar": _mmstar,
    "mmvp": _mmvp,
    "pope": _pope,
    "whatsup": _whatsup,
}
