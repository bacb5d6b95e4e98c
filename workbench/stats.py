"""Nulls and paired tests, and the intervals of workbench/intervals.py: what every analysis takes its uncertainty
from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats as scipy_stats
from torch import Tensor

from workbench.errors import DataError
from workbench.intervals import FEW_UNITS, finite
from workbench.intervals import Interval as Interval
from workbench.intervals import Kind as Kind
from workbench.intervals import mean_interval as mean_interval
from workbench.intervals import mean_intervals as mean_intervals
from workbench.intervals import t_interval as t_interval
from workbench.metrics.alignment import MAX_PAIRED_ROWS, METRICS, Array, Metric, check_same_rows

ROUNDING = 1e-10  # two sums of the same terms in another order differ by less, relative to the sum of their sizes


@dataclass(frozen=True)
class Null:
    """A metric when the pairing of x and y is broken: mean, 95th percentile, and the share of nulls at least as large
    as the value (add-one)."""

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
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """`mean_interval` under the name of the design document. Resampling covers too little, so there is none any more
    and `n` and `seed` change nothing."""
    return mean_interval(values, groups=groups, level=level)


def jackknife_ci(
    estimate: float, left_out: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95
) -> Interval:
    """Interval of a statistic from its values with one group of units left out at a time (delete-a-group jackknife,
    Student's t).

    For smooth statistics, such as a mean over pairs of units; see `split_half_ci` for those of nearest neighbours.
    """
    array = finite(left_out)
    groups = len(array)
    error = np.sqrt((groups - 1) / groups * ((array - array.mean()) ** 2).sum())
    half = float(scipy_stats.t.ppf((1 + level) / 2, groups - 1) * error)
    return Interval(estimate, estimate - half, estimate + half, units, level, few=units < FEW_UNITS)


def paired_test(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    kind: Kind = "real",
    level: float = 0.95,
    n: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Test whether b - a has mean 0 over pairs (the same images or seeds), by flipping signs.

    All 2^m flips are taken where there are at most `n`, and `n` random ones beside the one observed otherwise, so p is
    never 0.

    Args:
        kind: of b - a, for its interval (`workbench.intervals`).

    Raises:
        DataError: different lengths, no pairs, or a value that is not finite.
    """
    first, second = finite(a), finite(b)
    if len(first) != len(second):
        raise DataError(f"{len(first)} values against {len(second)}: expected pairs")
    return paired_columns((second - first)[:, None], kind=kind, level=level, n=n, seed=seed)[0]


def paired_columns(
    differences: np.ndarray, *, kind: Kind = "real", level: float = 0.95, n: int = 10_000, seed: int = 0
) -> list[Paired]:
    """`paired_test` of every column of `differences` (pair, column) from the same flips, where many layers are measured
    on the same images."""
    intervals = mean_intervals(differences, kind=kind, level=level)
    return [
        Paired(i.estimate, i.low, i.high, float(p), len(differences))
        for i, p in zip(intervals, sign_flip(differences, n=n, seed=seed), strict=True)
    ]


def sign_flip(differences: np.ndarray, *, n: int = 10_000, seed: int = 0) -> Float[np.ndarray, " column"]:
    """Two-sided p of each column of `differences` (pair, column): the share of sign flips whose sum is as far from 0 as
    the observed one.

    The unit of the differences does not matter: sums count as equal where they differ by less than rounding, which is
    relative to the sum of sizes.
    """
    pairs, columns = differences.shape
    largest = np.abs(differences).max(axis=0)
    # float64, and no sum that overflows or vanishes
    scaled = np.divide(differences, largest, out=np.zeros((pairs, columns)), where=largest > 0)
    least = np.abs(scaled.sum(axis=0)) - ROUNDING * np.abs(scaled).sum(axis=0)
    exact = 2**pairs <= n
    signs = (
        1.0 - 2 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1) if exact else _random_signs(n, pairs, seed)
    )
    reached = sum(
        (np.abs(part @ scaled) >= least).sum(axis=0) for part in np.array_split(signs, -(-len(signs) // 4096))
    )
    return np.asarray(reached / len(signs) if exact else (1 + reached) / (len(signs) + 1))


def half_splits(units: int, *, splits: int = 20, seed: int = 0) -> np.ndarray:
    """Random halves of `units`, (split, unit): True for the first half; an odd unit belongs to neither, so that both
    are of one size."""
    order = np.random.default_rng(seed).random((splits, units)).argsort(axis=1).argsort(axis=1)
    return np.where(order < units // 2, 1, np.where(order < 2 * (units // 2), 0, -1))


def split_half_ci(estimate: float, gaps: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95) -> Interval:
    """Interval of a statistic from its difference between two random halves of the units, in several splits.

    For statistics such as CKNNA on pooled tokens. A bootstrap would make every repeated unit its own nearest neighbour;
    a jackknife counts what hangs on pairs of units once for each of them, which makes it 1.4 to 1.5 times too wide
    (`python -m benchmarks.coverage --pooled_cknna`). Two halves share nothing, so half their squared difference is the
    variance at half the units, twice that of the whole, as long as variance falls with 1 / n.

    Args:
        gaps: score of one half less that of the other, for each split.
    """
    array = finite(gaps)
    error = np.sqrt((array**2).mean() / 4)
    half = float(scipy_stats.t.ppf((1 + level) / 2, _freedom(array, units)) * error)
    return Interval(estimate, estimate - half, estimate + half, units, level, few=units < FEW_UNITS)


def split_half_test(
    difference: float, gaps: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95
) -> Paired:
    """A difference of two statistics of the same units: `split_half_ci` of it, and Student's p. Equal in all halves,
    and not 0, it has no spread: p is 1."""
    interval, array = split_half_ci(difference, gaps, units, level=level), finite(gaps)
    error = float(np.sqrt((array**2).mean() / 4))
    if error <= ROUNDING * abs(difference):
        room = 0.0 if difference == 0 else np.inf
        return Paired(difference, difference - room, difference + room, 1.0, units)
    p = 2 * float(scipy_stats.t.sf(abs(difference) / error, _freedom(array, units)))
    return Paired(difference, interval.low, interval.high, p, units)


def _freedom(gaps: np.ndarray, units: int) -> int:
    return max(1, min(len(gaps), units - 1))


def first_reached(steps: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray, level: float) -> Reached:
    """The first step at which a curve of evaluations is at `level` or above it, on straight lines between evaluations.

    A curve that is above at its first evaluation reached the level at an unknown step before, unless that evaluation is
    at step 0.

    Raises:
        DataError: no evaluations, another number of scores than steps, steps that do not ascend, or a value that is not
            finite.
    """
    x, y = finite(steps), finite(scores)
    if len(x) != len(y) or (np.diff(x) <= 0).any():
        raise DataError(
            f"{len(y)} scores at steps {', '.join(f'{step:g}' for step in x)}: expected one for each of ascending steps"
        )
    above = (y >= level).nonzero()[0]
    first, last = float(x[0]), float(x[-1])
    if len(above) == 0:
        return Reached(None, f"not within {last:g} steps")
    at = int(above[0])
    if at == 0:
        return (
            Reached(0.0, "at the start")
            if first == 0
            else Reached(None, f"before the first evaluation at step {first:g}")
        )
    step = float(x[at - 1] + (level - y[at - 1]) / (y[at] - y[at - 1]) * (x[at] - x[at - 1]))
    return Reached(step, f"step {step:.0f}")


def holm(p: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Holm's correction (1979): p-values adjusted so that calling those below a level significant errs at all with at
    most that probability.

    Use it wherever many layers, heads or models are tested at once; it needs no independence between them.

    Args:
        weights: share of the error that each test may make, relative to the others (section 3 there); by default all
            the same. They are chosen before p is seen.

    Raises:
        DataError: no values, one outside 0..1, or weights that are not as many numbers above 0.
    """
    array = finite(p)
    if ((array < 0) | (array > 1)).any():
        raise DataError(f"p is {array[(array < 0) | (array > 1)][0]:g}: expected 0 to 1")
    shares = np.ones(len(array)) if weights is None else finite(weights)
    if len(shares) != len(array) or (shares <= 0).any():
        raise DataError(
            f"weights are {', '.join(f'{share:g}' for share in shares[:5])} for {len(array)} p-values: expected a"
            " number above 0 for each"
        )
    order = np.argsort(array / shares, kind="stable")
    remaining = shares[order][::-1].cumsum()[::-1]
    adjusted = np.maximum.accumulate(array[order] / shares[order] * remaining).clip(max=1)
    result = np.empty_like(array)
    result[order] = adjusted
    return result


def paired_differences(
    tables: Mapping[str, pd.DataFrame],
    *,
    by: Sequence[str],
    within: Sequence[str] = (),
    unit: str = "image_id",
    value: str = "value",
    seed: int = 0,
) -> pd.DataFrame:
    """Every table minus the first, by the columns `by`, over the units that both have: `paired_test`, Holm-corrected.

    Args:
        tables: {model: one row for each unit and combination of `by`}.
        within: columns of `by` whose values are questions of their own; Holm's correction is over the other ones (such
            as layers) and, without `within`, over all rows of a model.

    Returns:
        Columns model, against, those of `by`, score, low, high, p, p_holm, n_images; empty where there is one table, or
        where they share no unit.
    """
    columns = ["model", "against", *by, "score", "low", "high", "p", "p_holm", "n_images"]
    first, *others = tables
    parts = []
    for name in others:
        both = (
            tables[first]
            .merge(tables[name], on=[*by, unit], suffixes=("_a", "_b"))
            .dropna(subset=[f"{value}_a", f"{value}_b"])
        )
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
    """Summarise permuted values against the observed one; a value that equals it up to rounding is as large."""
    array = finite(nulls)
    reached = array >= value - ROUNDING * max(abs(value), float(np.abs(array).max()))
    return Null(float(array.mean()), float(np.quantile(array, 0.95)), float((1 + reached.sum()) / (len(array) + 1)))


def permutation_null(
    metric: Callable[..., float], x: Array, y: Array, *, n: int = 100, seed: int = 0, **options: int
) -> Null:
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
    return null_of(
        value, null_scores(known, [known.prepare(x, option, "x", 0)], known.prepare(y, option, "y", 1), orders)[:, 0]
    )


def null_scores(metric: Metric, xs: Sequence[Any], y: Any, orders: Int[Tensor, "draw *batch n"]) -> np.ndarray:
    """Scores of prepared `xs` against prepared `y` under random pairings, (draw, x, *batch); all x meet the same
    pairings."""
    moved = map(y.permuted, orders)
    return np.stack([np.stack([metric.score(x, other).cpu().numpy() for x in xs]) for other in moved])


def permutations(n: int, draws: int, seed: Sequence[int]) -> Int[Tensor, "draw n"]:
    """Random orders of n things; `seed` may name what they are for, such as (seed, image), so that they do not depend
    on batches."""
    return torch.from_numpy(np.random.default_rng(list(seed)).random((draws, n)).argsort(axis=1))
