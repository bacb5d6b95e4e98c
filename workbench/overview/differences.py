"""Differences between two groups of models: over seeds where they share several, else over the same images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from workbench.intervals import Interval, mean_intervals, t_interval, t_test
from workbench.overview.measures import Measure, by_image, scores
from workbench.overview.models import Model, Models
from workbench.overview.stored import Stored, StoredRun
from workbench.paired import holm, paired_differences

Over = Literal["seeds", "images"]


@dataclass(frozen=True)
class Pair:
    """The two groups of models that are compared: `second` minus `first`.

    Attributes:
        first, second: models of one variant each, by seed.
        shared: pairs of models with the same seed; if the groups share none, the pair of their first models.
    """

    first: tuple[Model, ...]
    second: tuple[Model, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What the groups are called: the variant, or the model where there is only one."""
        return _name(self.first), _name(self.second)

    @property
    def shared(self) -> tuple[tuple[Model, Model], ...]:
        """The models that are compared with one another.

        Of several trainings with one seed, such as a copied folder, the first one counts: they are no further seeds.
        """
        first, second = one_per_seed(self.first), one_per_seed(self.second)
        pairs = tuple((model, second[seed]) for seed, model in first.items() if seed in second)
        return pairs or ((self.first[0], self.second[0]),)

    @property
    def over(self) -> Over:
        """What the interval of a difference is over."""
        return "seeds" if len(self.shared) > 1 else "images"

    @property
    def keys(self) -> list[str]:
        """The keys of all compared models, the first group's first."""
        return [a.key for a, _ in self.shared] + [b.key for _, b in self.shared]

    def exchanged(self) -> Pair:
        """Return the pair the other way round."""
        return Pair(self.second, self.first)


def one_per_seed(models: Iterable[Model]) -> dict[int, Model]:
    """Return {seed: its first model} of the models whose seed is known."""
    by_seed: dict[int, Model] = {}
    for model in models:
        if model.seed is not None:
            by_seed.setdefault(model.seed, model)
    return by_seed


def _name(group: Sequence[Model]) -> str:
    return group[0].variant if len(group) > 1 else group[0].key


def pairs_of(models: Models, baseline: str, others: Sequence[str]) -> list[Pair]:
    """Return the pairs to compare: the variant of `baseline` with the variant of each of the others.

    Only the named models take part. Where all are of one variant, each model is compared with the baseline by itself.
    """
    named = [models.by_key[key] for key in dict.fromkeys((baseline, *others)) if key in models.by_key]
    groups: dict[str, list[Model]] = {}
    for model in named:
        groups.setdefault(model.variant, []).append(model)
    first, *rest = groups.values()
    if not rest:
        return [Pair((first[0],), (model,)) for model in first[1:]]
    return [Pair(tuple(first), tuple(group)) for group in rest]


def over_seeds(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Return the mean of one difference per seed, with Student's interval."""
    return t_interval(values, bounds=bounds)


# --- by layer -------------------------------------------------------------------------------------


def comparable(measure: Measure, pair: Pair, runs: Mapping[str, StoredRun]) -> list[tuple[StoredRun, StoredRun]]:
    """Return the pairs of runs whose difference in a measure means something (`Measure.alike`).

    Args:
        runs: {key of a model: its run}, all of the same question.
    """
    paired = [(runs[a.key], runs[b.key]) for a, b in pair.shared if a.key in runs and b.key in runs]
    return [(a, b) for a, b in paired if len({measure.alike(a), measure.alike(b)} - {()}) < 2]


def by_layer(measure: Measure, pair: Pair, runs: Mapping[str, StoredRun]) -> pd.DataFrame:
    """Return second minus first in every layer.

    Args:
        runs: {key of a model: its run}, all of the same question.

    Returns:
        Columns series, layer, score, low, high, error (standard error; NaN where all seeds are equal), p_holm (of a
        sign-flip test over images or Student's t-test over seeds, corrected over the layers of a series), n, over. The
        table is empty where runs are missing or not `comparable`, or no image is shared.
    """
    paired = comparable(measure, pair, runs)
    columns = ["series", "layer", "score", "low", "high", "error", "p_holm", "n", "over"]
    if not paired:
        return pd.DataFrame(columns=columns)
    table = _over_seeds(measure, paired) if len(paired) > 1 else _over_images(measure, *paired[0])
    return table.reindex(columns=columns)


def _over_seeds(measure: Measure, paired: Sequence[tuple[StoredRun, StoredRun]]) -> pd.DataFrame:
    table = scores(measure, [run for runs in paired for run in runs])
    measured = set(table["model"])  # an analysis may have been run without this measure, as knockout --no-objects
    paired = [(a, b) for a, b in paired if {a.model, b.model} <= measured]
    if len(paired) < 2:
        return pd.DataFrame()
    of_model = table.pivot(index=["series", "layer"], columns="model", values="score")
    of_model = of_model.reindex(table[["series", "layer"]].drop_duplicates().itertuples(index=False, name=None))
    wide = pd.concat([of_model[b.model] - of_model[a.model] for a, b in paired], axis=1).dropna()
    rows = []
    for (series, layer), values in zip(wide.index, wide.to_numpy(), strict=True):
        interval = over_seeds(values)
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if np.isfinite(interval.low) else np.nan
        scored = {"score": interval.estimate, "low": interval.low, "high": interval.high, "error": error}
        p = t_test(values)
        rows.append({"series": series, "layer": layer, **scored, "p": p, "n": len(values), "over": "seeds"})
    differences = pd.DataFrame(rows)
    if rows:
        differences["p_holm"] = differences.groupby("series")["p"].transform(lambda p: holm(p.to_numpy()))
    return differences


def _over_images(measure: Measure, first: StoredRun, second: StoredRun) -> pd.DataFrame:
    tables = {"first": by_image(measure, first), "second": by_image(measure, second)}
    tested = paired_differences(tables, by=("series", "layer"), within=("series",))
    both = tables["first"].merge(tables["second"], on=["series", "layer", "image_id"], suffixes=("_a", "_b")).dropna()
    change = (both["value_b"] - both["value_a"]).groupby([both["series"], both["layer"]])
    errors = (change.std() / np.sqrt(change.size())).rename("error")
    return (
        tested.merge(errors.reset_index(), on=["series", "layer"])
        .rename(columns={"n_images": "n"})
        .assign(over="images")
    )


def strip(pair: Pair, stored: Stored, measures: Mapping[str, Measure]) -> pd.DataFrame:
    """Return, for all measures at once, how clearly the two groups differ in each layer.

    Returns:
        Columns measure (key), title, layer, score, low, high, z (difference / its standard error), n, over, and runs,
        the question of the runs that were compared (`StoredRun.question`).
    """
    parts = []
    for key, measure in measures.items():
        runs = runs_of(stored, measure.analysis, pair.keys)
        table = quick_by_layer(measure, pair, runs) if runs else pd.DataFrame()
        if len(table):
            titles = [measure.title.format(series=series) for series in table["series"]]
            z = (table["score"] / table["error"].replace(0, np.nan)).mask(table["score"] == 0, 0.0)
            asked = next(iter(runs.values())).question
            parts.append(table.assign(measure=key, title=titles, z=z, runs=asked))
    columns = ["measure", "title", "layer", "score", "low", "high", "z", "n", "over", "runs"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def quick_by_layer(measure: Measure, pair: Pair, runs: Mapping[str, StoredRun]) -> pd.DataFrame:
    """Return `by_layer` without the sign-flip test, for hundreds of differences at once."""
    paired = comparable(measure, pair, runs)
    if len(paired) != 1:
        return _over_seeds(measure, paired) if paired else pd.DataFrame()
    a, b = (by_image(measure, run) for run in paired[0])
    both = a.merge(b, on=["series", "layer", "image_id"], suffixes=("_a", "_b")).dropna()
    if both.empty:
        return pd.DataFrame()
    wide = both.assign(change=both["value_b"] - both["value_a"]).pivot(
        index="image_id", columns=["series", "layer"], values="change"
    )
    wide = wide.loc[:, wide.count() > 1]  # an image may have a value in some layers only
    if wide.empty:
        return pd.DataFrame()
    rows = [
        {"series": series, "layer": layer, "score": i.estimate, "low": i.low, "high": i.high, "error": error, "n": i.n}
        for (series, layer), i, error in zip(
            wide.columns, mean_intervals(wide.to_numpy(), kind="real"), wide.std() / np.sqrt(wide.count()), strict=True
        )
    ]
    return pd.DataFrame(rows).assign(over="images")


def runs_of(stored: Stored, analysis: str, keys: Sequence[str], question: str = "") -> dict[str, StoredRun]:
    """Return {model: run} of the question that most of the models were asked, or of the question named."""
    lists = stored.of(analysis, keys)
    if question:
        lists = [runs for runs in lists if runs[0].question == question]
    return {run.model: run for run in lists[0]} if lists else {}
