"""Intervals, nulls and paired tests: the one place where uncertainty is computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats as scipy_stats
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.alignment import MAX_PAIRED_ROWS, METRICS, Array, Metric, check_same_rows


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `n` counts the independent units (images, seeds)."""

    estimate: float
    low: float
    high: float
    n: int
    level: float


@dataclass(frozen=True)
class Null:
    """A metric when the pairing of x and y is broken: mean, 95th percentile, and the share of nulls at least as large as the value (add-one)."""

    mean: float
    q95: float
    p: float


@dataclass(frozen=True)
class Paired:
    """Mean of b - a over pairs, its interval, and the two-sided p of a sign-flip test."""

    difference: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Reached:
    """When a curve first reaches a level: its step, None where that is not known, and the same in words."""

    step: float | None
    text: str


def bootstrap_ci(
    values: Sequence[float] | np.ndarray, *, groups: Sequence[Hashable] | None = None, level: float = 0.95, n: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `values` with a percentile bootstrap interval.

    Args:
        groups: unit of each value, such as its image; whole units are resampled, since values of one image are not independent.
        n: resamples.

    One unit says nothing about its spread: its interval is infinite.

    Raises:
        DataError: no values, or one that is not finite.
    """
    return bootstrap_columns(_finite(values)[:, None], groups=groups, level=level, n=n, seed=seed)[0]


def bootstrap_columns(values: np.ndarray, *, groups: Sequence[Hashable] | None = None, level: float = 0.95, n: int = 2000, seed: int = 0) -> list[Interval]:
    """`bootstrap_ci` of every column of `values` (row, column) from the same resamples, where many layers or heads are measured on the same images.

    A value that is NaN is absent: it counts neither in the mean nor, where it was its unit's only one, in `n`. A column of NaN has a NaN interval.
    """
    estimates, means, known = _resampled(values, groups, n, seed)
    few = known < 2
    means[:, few] = 0
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    low[few], high[few] = np.where(known[few] == 0, np.nan, -np.inf), np.where(known[few] == 0, np.nan, np.inf)
    return [Interval(float(e), float(lo), float(hi), int(k), level) for e, lo, hi, k in zip(estimates, low, high, known, strict=True)]


def bootstrap_mean_of_columns(values: np.ndarray, *, groups: Sequence[Hashable] | None = None, level: float = 0.95, n: int = 2000, seed: int = 0) -> Interval:
    """Mean over the columns of `values` (row, column) of each column's own mean, such as accuracy over question types, with a bootstrap interval.

    A value that is NaN is absent; a column that a resample leaves empty is left out of that resample. `n` counts the units.
    """
    estimates, means, _ = _resampled(values, groups, n, seed)
    units = len(values) if groups is None else len(set(groups))
    if units < 2:
        return Interval(float(np.nanmean(estimates)), -np.inf, np.inf, units, level)
    low, high = np.quantile(np.nanmean(means, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.nanmean(estimates)), float(low), float(high), units, level)


def _resampled(values: np.ndarray, groups: Sequence[Hashable] | None, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each column, the same in each of `n` resamples of whole units (resample, column), and the units that each column has."""
    there = ~np.isnan(values)
    codes = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(codes.max()) + 1
    sums, counts = np.zeros((units, values.shape[1])), np.zeros((units, values.shape[1]))
    np.add.at(sums, codes, np.where(there, values, 0))
    np.add.at(counts, codes, there)
    known = (counts > 0).sum(axis=0)
    weights = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=n).astype(float)
    with np.errstate(invalid="ignore"):
        return sums.sum(axis=0) / counts.sum(axis=0), (weights @ sums) / (weights @ counts), known


def t_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean with Student's interval, for the handful of values that seeds give; one value has an infinite interval.

    Args:
        bounds: what the mean can be, which Student's interval does not know: (0, 1) for an accuracy, whose interval is cut there.
    """
    array = _finite(values)
    if len(array) == 1:
        return Interval(float(array[0]), -np.inf, np.inf, 1, level)
    half = scipy_stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    low, high = np.clip([array.mean() - half, array.mean() + half], *bounds)
    return Interval(float(array.mean()), float(low), float(high), len(array), level)


def jackknife_ci(estimate: float, left_out: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95) -> Interval:
    """Interval of a statistic from its values with one group of units left out at a time (delete-a-group jackknife, Student's t).

    For statistics such as CKNNA on pooled tokens, where a bootstrap would make every repeated unit its own nearest neighbour.
    """
    array = _finite(left_out)
    groups = len(array)
    error = np.sqrt((groups - 1) / groups * ((array - array.mean()) ** 2).sum())
    half = float(scipy_stats.t.ppf((1 + level) / 2, groups - 1) * error)
    return Interval(estimate, estimate - half, estimate + half, units, level)


def paired_test(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, level: float = 0.95, n: int = 10_000, seed: int = 0) -> Paired:
    """Test whether b - a has mean 0 over pairs (the same images or seeds), by flipping signs.

    All 2^m flips are taken where there are at most `n`; the interval is Student's for fewer than 30 pairs and a bootstrap beyond.

    Raises:
        DataError: different lengths, no pairs, or a value that is not finite.
    """
    first, second = _finite(a), _finite(b)
    if len(first) != len(second):
        raise DataError(f"{len(first)} values against {len(second)}: expected pairs")
    return paired_columns((second - first)[:, None], level=level, n=n, seed=seed)[0]


def paired_columns(differences: np.ndarray, *, level: float = 0.95, n: int = 10_000, seed: int = 0) -> list[Paired]:
    """`paired_test` of every column of `differences` (pair, column) from the same flips and resamples, where many layers are measured on the same images."""
    pairs, sums = len(differences), np.abs(differences.sum(axis=0)) - 1e-12
    exact = 2**pairs <= n
    signs = 1.0 - 2 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1) if exact else _random_signs(n, pairs, seed)
    reached = sum((np.abs(part @ differences) >= sums).sum(axis=0) for part in np.array_split(signs, -(-len(signs) // 4096)))
    p = reached / len(signs) if exact else (1 + reached) / (len(signs) + 1)
    intervals = [t_interval(own, level=level) for own in differences.T] if pairs < 30 else bootstrap_columns(differences, level=level, seed=seed)
    return [Paired(i.estimate, i.low, i.high, float(own), pairs) for i, own in zip(intervals, p, strict=True)]


def jackknife_test(difference: float, left_out: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95) -> Paired:
    """A difference of two statistics of the same units, from its values with one group of units left out at a time: `jackknife_ci` and Student's p."""
    interval, groups = jackknife_ci(difference, left_out, units, level=level), len(left_out)
    error = (interval.high - difference) / scipy_stats.t.ppf((1 + level) / 2, groups - 1)
    p = 2 * float(scipy_stats.t.sf(abs(difference) / error, groups - 1)) if error > 0 else float(difference == 0)
    return Paired(difference, interval.low, interval.high, p, units)


def first_reached(steps: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray, level: float) -> Reached:
    """The first step at which a curve of evaluations is at `level` or above it, on straight lines between evaluations.

    A curve that is above at its first evaluation reached the level at an unknown step before, unless that evaluation is at step 0.

    Raises:
        DataError: no evaluations, another number of scores than steps, steps that do not ascend, or a value that is not finite.
    """
    x, y = _finite(steps), _finite(scores)
    if len(x) != len(y) or (np.diff(x) <= 0).any():
        raise DataError(f"{len(y)} scores at steps {', '.join(f'{step:g}' for step in x)}: expected one for each of ascending steps")
    above = (y >= level).nonzero()[0]
    first, last = float(x[0]), float(x[-1])
    if len(above) == 0:
        return Reached(None, f"not within {last:g} steps")
    at = int(above[0])
    if at == 0:
        return Reached(0.0, "at the start") if first == 0 else Reached(None, f"before the first evaluation at step {first:g}")
    step = float(x[at - 1] + (level - y[at - 1]) / (y[at] - y[at - 1]) * (x[at] - x[at - 1]))
    return Reached(step, f"step {step:.0f}")


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's correction (1979): p-values adjusted so that calling those below a level significant errs at all with at most that probability.

    Use it wherever many layers, heads or models are tested at once; it needs no independence between them.

    Raises:
        DataError: no values, or one outside 0..1.
    """
    array = _finite(p)
    if ((array < 0) | (array > 1)).any():
        raise DataError(f"p is {array[(array < 0) | (array > 1)][0]:g}: expected 0 to 1")
    order = np.argsort(array, kind="stable")
    adjusted = np.maximum.accumulate(array[order] * np.arange(len(array), 0, -1)).clip(max=1)
    result = np.empty_like(array)
    result[order] = adjusted
    return result


def paired_differences(
    tables: Mapping[str, pd.DataFrame], *, by: Sequence[str], within: Sequence[str] = (), unit: str = "image_id", value: str = "value", seed: int = 0
) -> pd.DataFrame:
    """Every table minus the first, by the columns `by`, over the units that both have: `paired_test`, Holm-corrected.

    Args:
        tables: {model: one row for each unit and combination of `by`}.
        within: columns of `by` whose values are questions of their own; Holm's correction is over the other ones (such as layers) and, without
            `within`, over all rows of a model.

    Returns:
        Columns model, against, those of `by`, score, low, high, p, p_holm, n_images; empty where there is one table, or where they share no unit.
    """
    columns = ["model", "against", *by, "score", "low", "high", "p", "p_holm", "n_images"]
    first, *others = tables
    parts = []
    for name in others:
        both = tables[first].merge(tables[name], on=[*by, unit], suffixes=("_a", "_b")).dropna(subset=[f"{value}_a", f"{value}_b"])
        rows = []
        for key, part in both.groupby(list(by), sort=False):
            test = paired_test(part[f"{value}_a"], part[f"{value}_b"], seed=seed)
            scores = {"score": test.difference, "low": test.low, "high": test.high, "p": test.p, "n_images": test.n}
            rows.append({"model": name, "against": first} | dict(zip(by, key, strict=True)) | scores)
        if rows:
            table = pd.DataFrame(rows)
            families = table.groupby(list(within), sort=False)["p"] if within else table.groupby("model")["p"]
            parts.append(table.assign(p_holm=families.transform(lambda p: holm(p.to_numpy()))))
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


@lru_cache(maxsize=2)  # many layers and heads are tested on the same images
def _random_signs(n: int, pairs: int, seed: int) -> np.ndarray:
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0], dtype=np.float32), size=(n, pairs))
    signs.setflags(write=False)
    return signs


def null_of(value: float, nulls: Sequence[float] | np.ndarray) -> Null:
    """Summarise permuted values against the observed one."""
    array = _finite(nulls)
    return Null(float(array.mean()), float(np.quantile(array, 0.95)), float((1 + (array >= value).sum()) / (len(array) + 1)))


def permutation_null(metric: Callable[..., float], x: Array, y: Array, *, n: int = 100, seed: int = 0, **options: int) -> Null:
    """Distribution of `metric(x, y)` when the rows of y are shuffled: its chance level for this n, d and k.

    For a metric of the registry each side is prepared once and only renumbered.
    """
    check_same_rows(x, y)
    value, orders = metric(x, y, **options), permutations(len(y), n, [seed])
    known = next((own for own in map(METRICS.get, METRICS) if metric in (own, own.function)), None)
    beyond = known is None or (known.square and len(x) > MAX_PAIRED_ROWS)
    if known is None or beyond or set(options) - {known.option}:  # cka(unbiased=False) is another metric
        return null_of(value, [metric(x, y[order], **options) for order in orders])
    option = options.get(known.option, 10)
    return null_of(value, null_scores(known, [known.prepare(x, option, "x")], known.prepare(y, option, "y"), orders)[:, 0])


def null_scores(metric: Metric, xs: Sequence[Any], y: Any, orders: Int[Tensor, "draw *batch n"]) -> np.ndarray:
    """Scores of prepared `xs` against prepared `y` under random pairings, (draw, x, *batch); all x meet the same pairings."""
    moved = map(y.permuted, orders)
    return np.stack([np.stack([metric.score(x, other).numpy() for x in xs]) for other in moved])


def permutations(n: int, draws: int, seed: Sequence[int]) -> Int[Tensor, "draw n"]:
    """Random orders of n things; `seed` may name what they are for, such as (seed, image), so that they do not depend on batches."""
    return torch.from_numpy(np.random.default_rng(list(seed)).random((draws, n)).argsort(axis=1))


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise DataError(f"values of shape {array.shape}: expected a non-empty list of numbers")
    if not np.isfinite(array).all():
        raise DataError(f"value {int((~np.isfinite(array)).nonzero()[0][0])} is not finite")
    return array
