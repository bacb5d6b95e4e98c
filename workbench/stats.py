"""Intervals, nulls and paired tests: the one place where uncertainty is computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
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
    there = ~np.isnan(values)
    codes = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(codes.max()) + 1
    sums, counts = np.zeros((units, values.shape[1])), np.zeros((units, values.shape[1]))
    np.add.at(sums, codes, np.where(there, values, 0))
    np.add.at(counts, codes, there)
    known = (counts > 0).sum(axis=0)
    weights = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=n).astype(float)
    with np.errstate(invalid="ignore"):
        estimates, means = sums.sum(axis=0) / counts.sum(axis=0), (weights @ sums) / (weights @ counts)
    few = known < 2
    means[:, few] = 0
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    low[few], high[few] = np.where(known[few] == 0, np.nan, -np.inf), np.where(known[few] == 0, np.nan, np.inf)
    return [Interval(float(e), float(lo), float(hi), int(k), level) for e, lo, hi, k in zip(estimates, low, high, known, strict=True)]


def t_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Mean with Student's interval, for the handful of values that seeds give; one value has an infinite interval."""
    array = _finite(values)
    if len(array) == 1:
        return Interval(float(array[0]), -np.inf, np.inf, 1, level)
    half = scipy_stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half), len(array), level)


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
