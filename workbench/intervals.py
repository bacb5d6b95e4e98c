"""Confidence intervals of means, by the kind of the quantity, where several values belong to one image.

Every interval of this project is computed here. `python -m benchmarks.coverage` simulates how often each interval
covers the true mean; docs/results/coverage.md has the table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from workbench.errors import DataError
from workbench.moments import Kind as Kind
from workbench.moments import Moments, Sums, moments

FEW_UNITS, FEW_EVENTS = 10, 5
Bounds = tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        n: number of independent units (images, seeds).
        level: confidence level, such as 0.95.
        few: whether there is too little data to conclude much: fewer than 10 units, or fewer than 5 answers that are
            wrong (or right, or changed). The interval is then wide.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float
    few: bool = False


def bounds_of(sums: Sums, kind: Kind, level: float = 0.95) -> tuple[Moments, Bounds]:
    """Return the moments and the interval of every column.

    Proportions and their differences (values 0, 1 and -1) have the score interval of Wilson (1927) or Tango (1998) with
    an effective number of questions. The variance of independent questions counts with the normal quantile. The
    variance that images add to it counts with Student's quantile, whose degrees of freedom follow from the weights of
    the units and are fewer if the spread comes from few units. No interval is narrower than that of independent
    questions. With fewer than 5 wrong (or right, or changed) answers, the spread between images cannot be estimated and
    is assumed: with no such answer, each image counts as one question. The interval of a proportion then also includes
    the interval of Clopper and Pearson (1934), since Wilson's covers too little there.

    Real values have Student's interval with the correction for skewness of Hall (1992).

    Proportions of values between 0 and 1 (shares of an image) have an interval of Wilson's shape, with the variance
    between units and Student's quantile.
    """
    m = moments(sums, kind)
    return m, _bounds(m, kind, level)


def _bounds(m: Moments, kind: Kind, level: float) -> Bounds:
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "real":
            low, high = _hall(m, level)
        else:
            scale = _score_scale(m, level)
            low, high = wilson(m.mean, scale) if kind == "proportion" else tango(m.positive, m.negative, scale)
            if kind == "proportion":
                exact_low, exact_high = clopper_pearson(m.mean, scale, level)
                few = m.discrete & (m.events < FEW_EVENTS)
                low = np.where(few, np.fmin(low, exact_low), low)
                high = np.where(few, np.fmax(high, exact_high), high)
    ends = {"proportion": (0.0, 1.0), "difference": (-1.0, 1.0), "real": (-np.inf, np.inf)}[kind]
    low, high = (np.where(m.units == 1, end, edge) for end, edge in zip(ends, (low, high), strict=True))
    low, high = (np.where(m.units == 0, np.nan, edge.clip(*ends)) for edge in (low, high))
    return np.fmin(low, m.mean), np.fmax(high, m.mean)


def _score_scale(m: Moments, level: float) -> Float[np.ndarray, " column"]:
    """Return the squared quantile divided by the effective number of values, the scale of a score interval."""
    z = special.ndtri((1 + level) / 2)
    t = _student(m, level)
    assumed = 1 + (m.clustering - 1) * np.clip(1 - np.minimum(m.events, 2 * m.tail) / FEW_EVENTS, 0, 1) ** 2
    independent = m.within * assumed
    variance = z**2 * independent + t**2 * np.maximum(m.between - independent, 0)
    # few units give a poor estimate of their spread: the whole variance then counts with Student's quantile
    caution = np.clip((FEW_UNITS - m.kish) / 4, 0, 1)
    square = np.where(
        m.discrete, variance + caution * (np.maximum(variance, t**2 * m.between) - variance), t**2 * m.between
    )
    scale = np.where(m.spread * square > 0, square / np.where(m.spread > 0, m.spread, 1), z**2 / m.kish)
    # upper bound: the spread between units is largest if the values of a unit are all equal; with a single changed
    # answer the estimate may exceed it
    largest = (
        special.stdtrit(np.clip(np.where(np.isfinite(m.kish), m.kish, 2) - 1, 1, None), (1 + level) / 2) ** 2 / m.kish
    )
    return np.asarray(np.fmin(scale, np.maximum(largest, z**2 / m.kish)))


def _student(m: Moments, level: float) -> Float[np.ndarray, " column"]:
    """Return Student's quantile of each column.

    The degrees of freedom are reduced if the weights of the units differ, or if the spread comes from few units.
    """
    freedom = np.clip(np.minimum(m.kish - 1, 2 * m.tail - 2), 1, None)
    return np.asarray(special.stdtrit(np.where(np.isfinite(freedom), freedom, 1), (1 + level) / 2))


def wilson(p: Float[np.ndarray, " column"], scale: Float[np.ndarray, " column"]) -> Bounds:
    """Return the ends of all q with (p - q)^2 <= scale q (1 - q) (Wilson 1927).

    Args:
        p: the observed proportions.
        scale: z^2 / n for n independent answers.
    """
    middle, half = (p + scale / 2) / (1 + scale), np.sqrt(scale * p * (1 - p) + scale**2 / 4) / (1 + scale)
    return (middle - half).clip(0, 1), (middle + half).clip(0, 1)


def clopper_pearson(
    p: Float[np.ndarray, " column"], scale: Float[np.ndarray, " column"], level: float = 0.95
) -> Bounds:
    """Return the exact interval of a proportion of n independent answers (Clopper and Pearson 1934).

    Args:
        p: the observed proportions.
        scale: z^2 / n, as in `wilson`; n need not be a whole number.
        level: the confidence level, which z belongs to.
    """
    n = special.ndtri((1 + level) / 2) ** 2 / scale
    right, wrong, tail = p * n, (1 - p) * n, (1 - level) / 2
    low = np.where(right > 0, special.betaincinv(np.maximum(right, 1e-300), wrong + 1, tail), 0.0)
    return low, np.where(wrong > 0, special.betaincinv(right + 1, np.maximum(wrong, 1e-300), 1 - tail), 1.0)


def tango(
    gained: Float[np.ndarray, " column"], lost: Float[np.ndarray, " column"], scale: Float[np.ndarray, " column"]
) -> Bounds:
    """Return the ends of all differences d that the score test does not reject (Tango 1998, eq. 6).

    Args:
        gained, lost: shares of all pairs of answers; the observed difference is `gained` - `lost`.
        scale: z^2 / n, as in `wilson`.
    """
    d = gained - lost

    def inside(at: np.ndarray) -> np.ndarray:
        b, c = (2 - d) * at - gained - lost, -lost * at * (1 - at)
        # maximum likelihood estimate of the share of losses, given the difference `at`
        likely = (np.sqrt((b * b - 8 * c).clip(min=0)) - b) / 4
        return (d - at) ** 2 <= scale * (2 * likely + at * (1 - at)).clip(min=0)

    edges = []
    for end in (-1.0, 1.0):
        accepted, rejected = d.copy(), np.full_like(d, end)
        for _ in range(50):
            middle = (accepted + rejected) / 2
            accepted, rejected = (
                np.where(inside(middle) == is_inside, middle, edge)
                for is_inside, edge in ((True, accepted), (False, rejected))
            )
        edges.append(np.where(inside(np.full_like(d, end)), end, rejected))
    return edges[0], edges[1]


def _hall(m: Moments, level: float) -> Bounds:
    """Return Student's interval corrected for skewness by Hall's monotone transformation of the t statistic.

    Source: Hall (1992), J. R. Stat. Soc. B 54, 221-228.
    """
    error, t = np.sqrt(m.between), _student(m, level)
    a = m.skewness / np.sqrt(m.units)

    def corrected(quantile: np.ndarray) -> np.ndarray:
        slope = np.where(np.abs(a) < 1e-6, 1.0, a)
        return np.where(np.abs(a) < 1e-6, quantile, 3 / slope * (np.cbrt(1 + slope * (quantile - slope / 6)) - 1))

    return m.mean - error * corrected(t), m.mean - error * corrected(-t)


def mean_intervals(
    values: np.ndarray,
    *,
    kind: Kind,
    groups: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    level: float = 0.95,
) -> list[Interval]:
    """Return the mean of every column of `values` with its interval.

    NaN is a missing value: it does not count in the mean, and a unit without other values does not count in `n`. One
    unit has no spread: its interval is the whole range of the kind. A column of NaN has a NaN interval.

    Args:
        values: (row, column).
        kind: what the values are; see `Kind` and `bounds_of`.
        groups: unit of each row, such as its image: values of one image are not independent.
        weights: how many values each row counts as, such as 1/2 for one of two answers to a question.

    Raises:
        DataError: a value outside the range of the kind, or not one group per row.
    """
    return _measured(np.asarray(values, dtype=np.float64), kind, groups, None, level, weights)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    kind: Kind | None = None,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval:
    """Return the mean of `values` with its interval, as `mean_intervals` does for a column.

    Args:
        kind: what the values are. By default it follows from the values: only 0 and 1 are a proportion, only -1, 0 and
            1 a difference, others real.
        groups: unit of each value, such as its image.
        strata: stratum of each value, such as its question type; the estimate is then the mean over strata of the mean
            of each, so that every stratum has the same weight.

    Raises:
        DataError: no values; a value that is not finite or outside the range of the kind; not one label per value.
    """
    array = finite(values)
    return _measured(array[:, None], kind or _kind_of(array), groups, strata, level)[0]


def mean_test(
    values: Sequence[float] | np.ndarray,
    *,
    kind: Kind,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    than: float = 0.0,
) -> float:
    """Return the two-sided p of a mean against `than`, from its interval: 1 - the lowest level that includes `than`.

    So p is below 0.05 where `mean_interval` with the same arguments leaves `than` out, and only there.

    Raises:
        DataError: as `mean_interval`.
    """
    array = finite(values)
    _check_kind(array, kind)
    m = moments(Sums.of(array[:, None], groups, strata), kind)

    def inside(p: float) -> bool:
        low, high = _bounds(m, kind, 1 - p)
        return bool(low[0] <= than <= high[0])

    smallest, largest = -40.0, 0.0  # of log2(p)
    if inside(1 - 1e-9):
        return 1.0
    for _ in range(25):
        middle = (smallest + largest) / 2
        smallest, largest = (middle, largest) if inside(2**middle) else (smallest, middle)
    return float(2**largest)


def _kind_of(values: np.ndarray) -> Kind:
    """Return the narrowest kind that allows all values."""
    if np.isin(values, (0, 1)).all():
        return "proportion"
    return "difference" if np.isin(values, (-1, 0, 1)).all() else "real"


def sum_interval(parts: Sequence[Interval], weights: Sequence[float]) -> Interval:
    """Return the weighted sum of estimates from different units, such as the images of several sources.

    The interval is that of Zou and Donner (2008, Stat. Med. 27, 1693-1702), which recovers the variance of each
    estimate, separately below and above it, from its own interval.

    Args:
        parts: intervals of independent estimates.
        weights: positive, one for each.
    """
    weight = np.asarray(weights, dtype=np.float64)
    estimates, lows, highs = (np.array([getattr(p, name) for p in parts]) for name in ("estimate", "low", "high"))
    total = float(weight @ estimates)
    below, above = (float(np.sqrt(((weight * (end - estimates)) ** 2).sum())) for end in (lows, highs))
    units = sum(part.n for part in parts)
    return Interval(total, total - below, total + above, units, parts[0].level, any(part.few for part in parts))


def _measured(
    values: np.ndarray,
    kind: Kind,
    groups: Sequence[Hashable] | None,
    strata: Sequence[Hashable] | None,
    level: float,
    weights: Sequence[float] | None = None,
) -> list[Interval]:
    """Return the interval of every column of `values` (row, column)."""
    _check_kind(values, kind)
    largest_size = np.nanmax(np.abs(np.where(np.isnan(values), 0, values)), axis=0, initial=0)
    # real values are scaled by a power of 2, so that their squares neither overflow nor underflow
    unit = 2.0 ** np.floor(np.log2(np.where((kind == "real") & (largest_size > 0), largest_size, 1)))
    m, (low, high) = bounds_of(Sums.of(values / unit, groups, strata, weights), kind, level)
    few = (m.units < FEW_UNITS) | ((m.events < FEW_EVENTS) & m.discrete & (kind != "real"))
    columns: tuple[Any, ...] = (m.mean * unit, low * unit, high * unit, m.units, few)
    return [
        Interval(float(e), float(a), float(b), int(k), level, bool(f)) for e, a, b, k, f in zip(*columns, strict=True)
    ]


def _check_kind(values: np.ndarray, kind: Kind) -> None:
    least, most = {"proportion": (0, 1), "difference": (-1, 1), "real": (-np.inf, np.inf)}[kind]
    slack = 1e-9  # for rounding errors of values that are means themselves
    wrong = values[(values < least - slack) | (values > most + slack)]
    if len(wrong):
        raise DataError(f"a {kind} has the value {wrong[0]:g}: expected values from {least} to {most}")


def t_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    trials: int | None = None,
) -> Interval:
    """Return the mean of a few independent values, such as one per seed, with Student's interval.

    A single value has no spread, and its interval is the whole range of `bounds`; so is that of equal values without
    `trials`. Without `bounds`, values that are all 0, as differences of equal models are, have the interval 0 to 0.

    Args:
        bounds: the range of the mean, (0, 1) for an accuracy. The spread of an accuracy shrinks towards its bounds, so
            with finite bounds the interval has Wilson's shape with Student's quantile; Student's own interval covers
            too little near 1.
        trials: number of questions that each accuracy is the mean of. Equal values, which show no spread, then have
            Wilson's interval for that number of questions.

    Raises:
        DataError: no values, or one that is not finite.
    """
    array = finite(values)
    n, mean = len(array), float(np.mean(array))
    wrong = 0 if trials is None else n * trials * min(mean - bounds[0], bounds[1] - mean) / (bounds[1] - bounds[0])
    interval = partial(Interval, mean, n=n, level=level, few=n == 1 or (trials is not None and wrong < FEW_EVENTS))
    if n == 1:
        return interval(low=bounds[0], high=bounds[1])
    error, t = array.std(ddof=1) / np.sqrt(n), special.stdtrit(n - 1, (1 + level) / 2)
    if not np.isfinite(bounds).all():
        if _equal(array) and array.any():
            return interval(low=bounds[0], high=bounds[1])
        low, high = np.clip([mean - t * error, mean + t * error], *bounds)
        return interval(low=float(low), high=float(high))
    span = bounds[1] - bounds[0]
    p = min(max((mean - bounds[0]) / span, 0.0), 1.0)
    if np.ptp(array) <= 1e-12 * span:
        if trials is None:
            return interval(low=bounds[0], high=bounds[1])
        scale = special.ndtri((1 + level) / 2) ** 2 / trials
    else:
        scale = (t * error / span) ** 2 / (p * (1 - p))
    low, high = (bounds[0] + span * float(edge[0]) for edge in wilson(np.array([p]), np.array([scale])))
    return interval(low=min(low, mean), high=max(high, mean))


def t_test(values: Sequence[float] | np.ndarray, than: float = 0.0) -> float:
    """Return the two-sided p of Student's t-test of a mean against `than`; 1 for values without spread.

    Raises:
        DataError: no values, or one that is not finite.
    """
    array = finite(values)
    if _equal(array):
        return 1.0
    error = array.std(ddof=1) / np.sqrt(len(array))
    return float(2 * special.stdtr(len(array) - 1, -abs(array.mean() - than) / error))


def _equal(array: np.ndarray) -> bool:
    """Return whether all values are equal but for rounding."""
    return bool(np.ptp(array) <= 1e-12 * max(1.0, np.abs(array).max()))


def finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return `values` as a float64 array.

    Raises:
        DataError: not a one-dimensional list, no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise DataError(f"values of shape {array.shape}: expected a non-empty list of numbers")
    if not np.isfinite(array).all():
        position = int((~np.isfinite(array)).nonzero()[0][0])
        raise DataError(f"value {position} is {array[position]}: expected finite numbers")
    return array
