"""Paired tests, Holm's correction and resampling of independent units, without torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import special

from workbench.errors import DataError
from workbench.intervals import FEW_UNITS, Interval, Kind, finite, mean_interval, mean_intervals

T = TypeVar("T")

ROUNDING = 1e-10  # sums of the same terms in different orders differ by less, relative to the sum of absolute values


@dataclass(frozen=True)
class Paired:
    """Mean of b - a over `n` pairs, its interval, and the two-sided p-value of a sign-flip test."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return `mean_interval` of `values`; the name stays for existing callers.

    There is no resampling, since bootstrap intervals cover too little; `n` and `seed` have no effect.
    """
    return mean_interval(values, groups=groups, level=level)


def sums_interval(
    images: Sequence[str] | pd.Series,
    counts: Mapping[str, np.ndarray],
    statistic: Callable[[Mapping[str, Any]], Any],
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """Return a statistic of sums over questions with a percentile interval that resamples images.

    Args:
        images: (question,), the image of each.
        counts: {name: (question,)}.
        statistic: {name: sums of any shape} -> values of that shape, NaN where undefined.
        seed: of the resampling.
        resamples: how many times the images are resampled.
    """
    codes, unique = pd.factorize(np.asarray(images))
    sums = np.stack([np.bincount(codes, weights=values, minlength=len(unique)) for values in counts.values()], axis=1)
    draws = np.random.default_rng(seed).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = float(statistic(dict(zip(counts, sums.sum(0), strict=True))))
        resampled = statistic(dict(zip(counts, (draws @ sums).T, strict=True)))
    defined = resampled[np.isfinite(resampled)]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) and np.isfinite(estimate) else (np.nan, np.nan)
    return Interval(estimate, float(low), float(high), len(unique), 0.95, few=len(unique) < 10)


def jackknife_ci(
    estimate: float, left_out: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95
) -> Interval:
    """Return the delete-a-group jackknife interval of a statistic, with Student's quantile.

    For smooth statistics, such as a mean over pairs of units; for statistics of nearest neighbors use `split_half_ci`.

    Args:
        left_out: the statistic without each group of units in turn.
        units: number of independent units.
    """
    array = finite(left_out)
    groups = len(array)
    error = np.sqrt((groups - 1) / groups * ((array - array.mean()) ** 2).sum())
    half = float(special.stdtrit(groups - 1, (1 + level) / 2) * error)
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

    All 2^m sign flips of m pairs are used if there are at most `n`; otherwise `n` random ones and the observed one, so
    that p is never 0.

    Args:
        kind: the kind of b - a, for its interval (`workbench.intervals.Kind`).
        n: the largest number of sign flips.
        seed: seed of the random sign flips.

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
    """Return `paired_test` of every column of `differences` (pair, column).

    The sign flips are the same for all columns, which are for example layers measured on the same images.
    """
    intervals = mean_intervals(differences, kind=kind, level=level)
    return [
        Paired(i.estimate, i.low, i.high, float(p), len(differences))
        for i, p in zip(intervals, sign_flip(differences, n=n, seed=seed), strict=True)
    ]


def sign_flip(differences: np.ndarray, *, n: int = 10_000, seed: int = 0) -> Float[np.ndarray, " column"]:
    """Return the two-sided p-value of a sign-flip test of each column of `differences` (pair, column).

    It is the share of sign flips whose sum is at least as far from 0 as the observed sum. Sums that differ by less
    than rounding errors count as equal; these are relative to the sum of absolute values, so that the unit of the
    differences does not matter.

    Raises:
        DataError: a difference that is not finite.
    """
    pairs, columns = differences.shape
    if not (finite_columns := np.isfinite(differences).all(axis=0)).all():
        column = int((~finite_columns).argmax())
        wrong = differences[~np.isfinite(differences[:, column]), column][0]
        raise DataError(f"column {column} has a difference that is {wrong}: expected finite numbers")
    largest = np.abs(differences).max(axis=0)
    # in float64 and scaled, so that no sum overflows or underflows
    scaled = np.divide(differences, largest, out=np.zeros((pairs, columns)), where=largest > 0)
    threshold = np.abs(scaled.sum(axis=0)) - ROUNDING * np.abs(scaled).sum(axis=0)
    exact = 2**pairs <= n
    signs = _all_signs(pairs) if exact else _random_signs(n, pairs, seed)
    parts = np.array_split(signs, -(-len(signs) // 4096))
    extreme = sum((np.abs(part @ scaled) >= threshold).sum(axis=0) for part in parts)
    return np.asarray(extreme / len(signs) if exact else (1 + extreme) / (len(signs) + 1))


def flips_for(tests: int) -> int:
    """Return how many random sign flips `tests` tests need.

    The smallest possible p stays below .05 when Holm's correction is over all of them.
    """
    return max(10_000, 40 * tests)


def _all_signs(pairs: int) -> np.ndarray:
    """Return all combinations of signs, (2^pairs, pairs)."""
    return 1.0 - 2 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1)


def half_splits(units: int, *, splits: int = 20, seed: int = 0) -> np.ndarray:
    """Return random splits of `units` into two halves of equal size, (split, unit).

    1 marks the first half, -1 the second; if the number of units is odd, one of them is in neither half and has 0.
    """
    order = np.random.default_rng(seed).random((splits, units)).argsort(axis=1).argsort(axis=1)
    return np.where(order < units // 2, 1, np.where(order < 2 * (units // 2), 0, -1))


def split_half_ci(estimate: float, gaps: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95) -> Interval:
    """Return the interval of a statistic from its difference between random halves of the units.

    For statistics such as CKNNA on pooled tokens. A bootstrap would make every repeated unit its own nearest neighbor.
    A jackknife counts the contribution of a pair of units once for each of the two, so that its interval is 1.4 to 1.5
    times too wide (`python -m benchmarks.coverage --pooled_cknna`). The two halves are independent, so half of their
    squared difference estimates the variance for half the units. This is twice the variance for all units, provided
    that the variance falls with 1 / n.

    Args:
        gaps: for each split, the score of the first half minus that of the second.
        units: number of independent units.
    """
    array = finite(gaps)
    error = np.sqrt((array**2).mean() / 4)
    half = float(special.stdtrit(_freedom(array, units), (1 + level) / 2) * error)
    return Interval(estimate, estimate - half, estimate + half, units, level, few=units < FEW_UNITS)


def split_half_test(
    difference: float, gaps: Sequence[float] | np.ndarray, units: int, *, level: float = 0.95
) -> Paired:
    """Test a difference of two statistics of the same units: `split_half_ci`, and the p-value of Student's t test.

    A difference other than 0 that is equal in all halves has no spread: p is 1 and the interval infinite.
    """
    interval, array = split_half_ci(difference, gaps, units, level=level), finite(gaps)
    error = float(np.sqrt((array**2).mean() / 4))
    if error <= ROUNDING * abs(difference):
        half = 0.0 if difference == 0 else np.inf
        return Paired(difference, difference - half, difference + half, 1.0, units)
    p = 2 * float(special.stdtr(_freedom(array, units), -abs(difference) / error))
    return Paired(difference, interval.low, interval.high, p, units)


def _freedom(gaps: np.ndarray, units: int) -> int:
    """Return the degrees of freedom of `split_half_ci`."""
    return max(1, min(len(gaps), units - 1))


def holm(p: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Return the p-values adjusted by Holm's correction (1979).

    If all adjusted p-values below a level are called significant, the probability of any false positive is at most that
    level. Use it wherever many layers, heads or models are tested at once; the tests need not be independent.

    Args:
        weights: the weight of each test (section 3 of Holm 1979): the share of the error probability that it gets; by
            default all equal. Choose them before looking at p.

    Raises:
        DataError: no values, a value outside 0 to 1, or not one weight above 0 for each.
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


def values_by_unit(values: Float[np.ndarray, "row column"], units: Sequence[Hashable]) -> pd.DataFrame:
    """Return one value for each unit, such as an image, whose mean is the mean of all rows, such as its questions.

    It is the mean plus the unit's first-order effect on it. If all units have equally many rows, it is the mean of the
    unit's rows; otherwise the mean of these means would be another number than the mean of all rows.

    Args:
        values: NaN is a missing value.
        units: the unit of each row.

    Returns:
        One row for each unit, in the order of their first appearance; NaN for a unit without a value.
    """
    table = pd.DataFrame(values)
    mean = table.mean()
    effects = table.sub(mean).groupby(list(units), sort=False).sum(min_count=1)
    return mean + effects * effects.notna().sum() / table.count()


def paired_differences(
    tables: Mapping[str, pd.DataFrame],
    *,
    by: Sequence[str],
    within: Sequence[str] = (),
    unit: str = "image_id",
    value: str = "value",
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every table with the first by `paired_test`, over the units that both have, with Holm's correction.

    Args:
        tables: {model: one row for each unit and combination of `by`}.
        by: columns, such as the layer; there is one difference for each combination of their values.
        within: columns of `by`; Holm's correction is made separately for each combination of their values, and by
            default over all rows of a model.
        unit: column of the unit that is paired, such as the image; a unit has one row for each combination of `by`.
        value: column of the values.

    Returns:
        Columns model, against, those of `by`, score (model minus the first), low, high, p, p_holm, n_images. The table
        is empty if there is only one table, or if no unit is shared.

    Raises:
        DataError: a unit has two different values.
    """
    columns = ["model", "against", *by, "score", "low", "high", "p", "p_holm", "n_images"]
    first, *others = tables
    parts = []
    for name in others:
        pair = [_one_each(tables[each], [*by, unit], value) for each in (first, name)]
        both = pair[0].merge(pair[1], on=[*by, unit], suffixes=("_a", "_b"))
        if both.empty:
            continue
        keys = both[list(by)].drop_duplicates(ignore_index=True)
        wide = both.assign(
            key=both.groupby(list(by), sort=False).ngroup(),
            change=both[f"{value}_b"].astype(float) - both[f"{value}_a"].astype(float),
        ).pivot(index=unit, columns="key", values="change")
        wide = wide.loc[both[unit].unique()]  # in the order of the first table, which the random signs follow
        families = keys.groupby(list(within)) if within else keys.groupby(lambda _: 0)
        tests = _tests(wide.to_numpy(), n=flips_for(int(families.size().max())), seed=seed)
        table = keys.assign(
            model=name,
            against=first,
            score=[test.difference for test in tests],
            low=[test.low for test in tests],
            high=[test.high for test in tests],
            p=[test.p for test in tests],
            n_images=[test.n for test in tests],
        )
        for rows in families.indices.values():
            table.loc[rows, "p_holm"] = holm(table.loc[rows, "p"].to_numpy())
        parts.append(table)
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _one_each(table: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """Return the rows of a table that have a value, each once.

    Raises:
        DataError: a unit has two different values.
    """
    rows = table.dropna(subset=[*keys, value]).drop_duplicates([*keys, value])
    if (twice := rows.duplicated(keys)).any():
        named = ", ".join(f"{key} {rows.loc[twice, key].iloc[0]}" for key in keys)
        raise DataError(f"{named} has two different values: expected one")
    return rows


def _tests(changes: np.ndarray, *, n: int, seed: int) -> list[Paired]:
    """Return `paired_columns` of changes (unit, column), each column over the units that have it, not NaN."""
    tests: dict[int, Paired] = {}
    measured = ~np.isnan(changes)
    for has in np.unique(measured, axis=1).T:  # the columns with the same units are tested together
        alike = (measured == has[:, None]).all(axis=0).nonzero()[0]
        tests |= dict(zip(alike.tolist(), paired_columns(changes[np.ix_(has, alike)], n=n, seed=seed), strict=True))
    return [tests[column] for column in range(changes.shape[1])]


def differences_on_shared(
    items: Mapping[str, T], tables: Callable[[T, T], tuple[pd.DataFrame, pd.DataFrame]], **options: Any
) -> pd.DataFrame:
    """Compare every model with the first by `paired_differences`, each on what it shares with the first.

    Args:
        items: {model: such as its run}.
        tables: returns the tables of the first model and of another one, on what both have.
        options: of `paired_differences`.
    """
    (first, reference), *others = items.items()
    parts = [
        paired_differences(dict(zip((first, name), tables(reference, item), strict=True)), **options)
        for name, item in others
    ]
    full = [part for part in parts if len(part)]
    return pd.concat(full, ignore_index=True) if full else paired_differences({first: pd.DataFrame()}, **options)


@lru_cache(maxsize=2)  # many layers and heads are tested on the same images
def _random_signs(n: int, pairs: int, seed: int) -> np.ndarray:
    """Return `n` random combinations of signs, (n, pairs)."""
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0], dtype=np.float32), size=(n, pairs))
    signs.setflags(write=False)
    return signs
