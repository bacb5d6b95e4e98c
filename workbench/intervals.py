"""Intervals of means over questions that share images, by the kind of the quantity: the one place where their width is
computed.

`python -m benchmarks.coverage` simulates what each of them covers; docs/results/coverage.md has the table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats

from workbench.errors import DataError

Kind = Literal["proportion", "difference", "real"]
"""proportion: a mean of values from 0 to 1, such as an accuracy; difference: of two of them, values from -1 to 1; real:
anything else."""

FEW_UNITS, FEW_EVENTS = 10, 5
Bounds = tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        n: independent units (images, seeds).
        few: there is too little to say much: fewer than 10 units, or fewer than 5 wrong (or right, or changed) answers.
            The interval is then a wide one.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float
    few: bool = False


@dataclass(frozen=True)
class Sums:
    """Values summed by unit, all that an interval needs. Arrays are (stratum, unit, column); the estimate is the mean
    over strata of each one's mean.

    Attributes:
        count: how many values.
        total: their sum.
        square: the sum of their squares.
        size: the sum of their absolute values.
    """

    count: Float[np.ndarray, "stratum unit column"]
    total: Float[np.ndarray, "stratum unit column"]
    square: Float[np.ndarray, "stratum unit column"]
    size: Float[np.ndarray, "stratum unit column"]

    @classmethod
    def of(
        cls,
        values: Float[np.ndarray, "row column"],
        groups: Sequence[Hashable] | None,
        strata: Sequence[Hashable] | None,
    ) -> Sums:
        """Sums of rows by their unit and stratum; NaN is absent."""
        there = ~np.isnan(values)
        filled = np.where(there, values, 0.0)
        unit, stratum = (
            _codes(labels, len(values)) for labels in (np.arange(len(values)) if groups is None else groups, strata)
        )
        arrays = []
        for part in (there.astype(float), filled, filled**2, np.abs(filled)):
            array = np.zeros((int(stratum.max()) + 1, int(unit.max()) + 1, values.shape[1]))
            np.add.at(array, (stratum, unit), part)
            arrays.append(array)
        return cls(*arrays)


def _codes(labels: Sequence[Hashable] | np.ndarray | None, n: int) -> np.ndarray:
    if labels is None:
        return np.zeros(n, dtype=int)
    if len(labels) != n:
        raise DataError(f"{len(labels)} labels for {n} values: expected one each")
    known: dict[Hashable, int] = {}
    return np.array(
        [
            known.setdefault(label, len(known))
            for label in (labels.tolist() if isinstance(labels, np.ndarray) else labels)
        ]
    )


@dataclass(frozen=True)
class Moments:
    """What the sums say of each column: the estimate, and its variance as a mean over units and as one over independent
    values.

    Attributes:
        mean: the estimate.
        between: its variance from the spread of units (each unit's residual over 1 - its weight: CR2 of Bell and
            McCaffrey 2002 for a mean).
        within: its variance were all values independent.
        spread: the variance of a value that the shape of the score interval assumes, p (1 - p) for proportions.
        positive, negative: means of the positive and of the negative parts of values.
        events: values unlike the most common one: wrong (or right) answers; for differences, changed (or unchanged)
            ones.
        units: how many units have a value.
        kish: how many units of one size would weigh as evenly (Kish 1965).
        clustering: mean number of values of the unit of a value.
        tail: units that carry the spread, (sum e^2)^2 / sum e^4 of the residuals e; few where the spread comes from few
            units.
        skewness: of the residuals.
        discrete: no value lies between 0 and 1 or -1, so that the mean says what the spread of independent values is.
    """

    mean: Float[np.ndarray, " column"]
    between: Float[np.ndarray, " column"]
    within: Float[np.ndarray, " column"]
    spread: Float[np.ndarray, " column"]
    positive: Float[np.ndarray, " column"]
    negative: Float[np.ndarray, " column"]
    events: Float[np.ndarray, " column"]
    units: Float[np.ndarray, " column"]
    kish: Float[np.ndarray, " column"]
    clustering: Float[np.ndarray, " column"]
    tail: Float[np.ndarray, " column"]
    skewness: Float[np.ndarray, " column"]
    discrete: np.ndarray


def moments(sums: Sums, kind: Kind) -> Moments:
    """Moments of every column. A stratum without values is left out of the mean of strata; a column without any is
    NaN."""
    n = sums.count.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = 1 / (n * (n > 0).sum(axis=0))  # of one value, (stratum, column)
        weight = np.where(n > 0, weight, 0.0)
        means = np.where(n > 0, sums.total.sum(axis=1) / n, 0.0)
        variances = np.where(n > 0, (sums.square.sum(axis=1) / n - means**2).clip(min=0), 0.0)
    mean = (weight * sums.total.sum(axis=1)).sum(axis=0)
    spread = (weight * n * variances).sum(axis=0)
    # a stratum whose few values agree by luck borrows two values' spread from the others
    pooled = np.where(n > 0, (n * variances + 2 * spread) / (n + 2), 0.0)
    residual = (weight[:, None] * (sums.total - means[:, None] * sums.count)).sum(axis=0)
    share = (weight[:, None] * sums.count).sum(axis=0)
    squares, fourth = (residual**2).sum(axis=0), (residual**4).sum(axis=0)
    size = (weight * sums.size.sum(axis=1)).sum(axis=0)
    units = (sums.count.sum(axis=0) > 0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        kish = 1 / (share**2).sum(axis=0)
        moment3 = (residual**3).sum(axis=0) / units
        skewness = np.where(squares > 0, moment3 / (squares / units) ** 1.5, 0.0)
        tail = np.where(squares > 0, squares**2 / fourth, 1.0)
        between = np.where(share < 1, residual**2 / (1 - share), 0.0).sum(axis=0)
    total, absolute = sums.total.sum(axis=(0, 1)), sums.size.sum(axis=(0, 1))
    positive, negative = (absolute + total) / 2, (absolute - total) / 2
    most = np.maximum(np.maximum(positive, negative), n.sum(axis=0) - absolute)
    return Moments(
        mean=np.where(units > 0, mean, np.nan),
        between=between,
        within=(weight**2 * n * pooled).sum(axis=0),
        spread=mean * (1 - mean) if kind == "proportion" else size - mean**2,
        positive=(size + mean) / 2,
        negative=(size - mean) / 2,
        events=n.sum(axis=0) - most,
        units=units,
        kish=kish,
        clustering=(share**2).sum(axis=0) / np.maximum((weight**2 * n).sum(axis=0), 1e-300),
        tail=tail,
        skewness=skewness,
        discrete=np.isclose(sums.square.sum(axis=(0, 1)), absolute, rtol=1e-9, atol=0),
    )


def bounds_of(sums: Sums, kind: Kind, level: float = 0.95) -> tuple[Moments, Bounds]:
    """Moments and interval of every column.

    Proportions and differences of them (values of 0, 1 and -1) have the score interval of Wilson (1927) or Tango (1998)
    with the effective number of questions: the questions' own variance counts with the normal quantile and what images
    add to it with Student's, whose degrees of freedom are those of the units' weights, fewer where few units carry the
    spread. No interval is narrower than that of independent questions. Below 5 wrong (or right, or changed) answers the
    spread between images cannot be seen: it is then assumed, up to one image being one question where there is none,
    and a proportion's interval holds that of Clopper and Pearson (1934) too, since Wilson's covers too little there.

    Real values have Student's interval with Hall's (1992) correction for skewness.

    Proportions of values between 0 and 1 (shares of an image) have Wilson's shape, with the variance between units and
    Student's quantile.
    """
    m = moments(sums, kind)
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "real":
            low, high = _hall(m, level)
        else:
            scale = _score_scale(m, level)
            low, high = wilson(m.mean, scale) if kind == "proportion" else tango(m.positive, m.negative, scale)
            if kind == "proportion":
                exact, few = clopper_pearson(m.mean, scale, level), m.discrete & (m.events < FEW_EVENTS)
                low, high = np.where(few, np.fmin(low, exact[0]), low), np.where(few, np.fmax(high, exact[1]), high)
    ends = {"proportion": (0.0, 1.0), "difference": (-1.0, 1.0), "real": (-np.inf, np.inf)}[kind]
    low, high = (np.where(m.units == 1, end, edge) for end, edge in zip(ends, (low, high), strict=True))
    low, high = (np.where(m.units == 0, np.nan, edge.clip(*ends)) for edge in (low, high))
    return m, (np.fmin(low, m.mean), np.fmax(high, m.mean))


def _score_scale(m: Moments, level: float) -> Float[np.ndarray, " column"]:
    """The squared quantile over the effective number of values, which a score interval is made of."""
    z = scipy_stats.norm.ppf((1 + level) / 2)
    t = _student(m, level)
    assumed = 1 + (m.clustering - 1) * np.clip(1 - np.minimum(m.events, 2 * m.tail) / FEW_EVENTS, 0, 1) ** 2
    independent = m.within * assumed
    added = z**2 * independent + t**2 * np.maximum(m.between - independent, 0)
    # few units say little of their spread: all of it then counts with Student's quantile
    wary = np.clip((FEW_UNITS - m.kish) / 4, 0, 1)
    square = np.where(m.discrete, added + wary * (np.maximum(added, t**2 * m.between) - added), t**2 * m.between)
    scale = np.where(m.spread * square > 0, square / np.where(m.spread > 0, m.spread, 1), z**2 / m.kish)
    # no spread between units is larger than that of units whose values are all alike; one changed answer may look as if
    # it were
    alike = (
        scipy_stats.t.ppf((1 + level) / 2, np.clip(np.where(np.isfinite(m.kish), m.kish, 2) - 1, 1, None)) ** 2 / m.kish
    )
    return np.asarray(np.fmin(scale, np.maximum(alike, z**2 / m.kish)))


def _student(m: Moments, level: float) -> Float[np.ndarray, " column"]:
    """Student's quantile; fewer degrees of freedom than units where their weights differ, or where few of them carry
    the spread."""
    freedom = np.clip(np.minimum(m.kish - 1, 2 * m.tail - 2), 1, None)
    return np.asarray(scipy_stats.t.ppf((1 + level) / 2, np.where(np.isfinite(freedom), freedom, 1)))


def wilson(p: Float[np.ndarray, " column"], scale: Float[np.ndarray, " column"]) -> Bounds:
    """All q with (p - q)^2 <= scale q (1 - q); `scale` is z^2 / n for n independent answers (Wilson 1927)."""
    middle, half = (p + scale / 2) / (1 + scale), np.sqrt(scale * p * (1 - p) + scale**2 / 4) / (1 + scale)
    return (middle - half).clip(0, 1), (middle + half).clip(0, 1)


def clopper_pearson(
    p: Float[np.ndarray, " column"], scale: Float[np.ndarray, " column"], level: float = 0.95
) -> Bounds:
    """The exact interval of as many independent answers as `scale` stands for, which need not be a whole number
    (Clopper and Pearson 1934)."""
    n = scipy_stats.norm.ppf((1 + level) / 2) ** 2 / scale
    right, wrong, tail = p * n, (1 - p) * n, (1 - level) / 2
    low = np.where(right > 0, scipy_stats.beta.ppf(tail, np.maximum(right, 1e-300), wrong + 1), 0.0)
    return low, np.where(wrong > 0, scipy_stats.beta.ppf(1 - tail, right + 1, np.maximum(wrong, 1e-300)), 1.0)


def tango(
    gained: Float[np.ndarray, " column"], lost: Float[np.ndarray, " column"], scale: Float[np.ndarray, " column"]
) -> Bounds:
    """Differences d that a score test of `gained` - `lost` does not reject, both being shares of all pairs; `scale` as
    in `wilson` (Tango 1998, eq. 6)."""
    d = gained - lost

    def inside(at: np.ndarray) -> np.ndarray:
        b, c = (2 - d) * at - gained - lost, -lost * at * (1 - at)
        # the most likely share of losses where the difference is `at`
        likely = (np.sqrt((b * b - 8 * c).clip(min=0)) - b) / 4
        return (d - at) ** 2 <= scale * (2 * likely + at * (1 - at)).clip(min=0)

    edges = []
    for end in (-1.0, 1.0):
        near, far = d.copy(), np.full_like(d, end)
        for _ in range(50):
            middle = (near + far) / 2
            near, far = (np.where(inside(middle) == ok, middle, edge) for ok, edge in ((True, near), (False, far)))
        edges.append(np.where(inside(np.full_like(d, end)), end, far))
    return edges[0], edges[1]


def _hall(m: Moments, level: float) -> Bounds:
    """Student's interval by Hall's monotone transformation (1992, J. R. Stat. Soc. B 54, 221-228), which takes the
    skewness out of the t statistic."""
    error, t = np.sqrt(m.between), _student(m, level)
    a = m.skewness / np.sqrt(m.units)

    def undone(quantile: np.ndarray) -> np.ndarray:
        steep = np.where(np.abs(a) < 1e-6, 1.0, a)
        return np.where(np.abs(a) < 1e-6, quantile, 3 / steep * (np.cbrt(1 + steep * (quantile - steep / 6)) - 1))

    return m.mean - error * undone(t), m.mean - error * undone(-t)


def mean_intervals(
    values: np.ndarray, *, kind: Kind, groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> list[Interval]:
    """Mean of every column of `values` (row, column) with its interval.

    Args:
        kind: what the values are; see `Kind` and `bounds_of`.
        groups: unit of each row, such as its image: values of one image are not independent.

    A value that is NaN is absent: it counts neither in the mean nor, where it was its unit's only one, in `n`. One unit
    says nothing about its spread: its interval is all that the kind allows. A column of NaN has a NaN interval.
    """
    return _measured(np.asarray(values, dtype=np.float64), kind, groups, None, level)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    kind: Kind | None = None,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval:
    """Mean of `values` with its interval; as `mean_intervals`.

    Args:
        kind: what the values are. By default it is read off them: nothing but 0 and 1 is a proportion, nothing but -1,
            0 and 1 a difference.
        groups: unit of each value, such as its image.
        strata: type of each value; the estimate is then the mean over types of each type's mean, in which every type
            weighs the same.

    Raises:
        DataError: no values, one that is not finite, or one outside what the kind allows.
    """
    array = finite(values)
    return _measured(array[:, None], kind or _kind_of(array), groups, strata, level)[0]


def _kind_of(values: np.ndarray) -> Kind:
    if np.isin(values, (0, 1)).all():
        return "proportion"
    return "difference" if np.isin(values, (-1, 0, 1)).all() else "real"


def _measured(
    values: np.ndarray, kind: Kind, groups: Sequence[Hashable] | None, strata: Sequence[Hashable] | None, level: float
) -> list[Interval]:
    _check_kind(values, kind)
    largest = np.nanmax(np.abs(np.where(np.isnan(values), 0, values)), axis=0, initial=0)
    # no square that overflows or vanishes
    unit = 2.0 ** np.floor(np.log2(np.where((kind == "real") & (largest > 0), largest, 1)))
    m, (low, high) = bounds_of(Sums.of(values / unit, groups, strata), kind, level)
    few = (m.units < FEW_UNITS) | ((m.events < FEW_EVENTS) & m.discrete & (kind != "real"))
    columns: tuple[Any, ...] = (m.mean * unit, low * unit, high * unit, m.units, few)
    return [
        Interval(float(e), float(a), float(b), int(k), level, bool(f)) for e, a, b, k, f in zip(*columns, strict=True)
    ]


def _check_kind(values: np.ndarray, kind: Kind) -> None:
    least, most = {"proportion": (0, 1), "difference": (-1, 1), "real": (-np.inf, np.inf)}[kind]
    slack = 1e-9  # means of many values that are rounded
    wrong = values[(values < least - slack) | (values > most + slack)]
    if len(wrong):
        raise DataError(f"a {kind} has the value {wrong[0]:g}: expected {least} to {most}")


def t_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    trials: int | None = None,
) -> Interval:
    """Mean with Student's interval, for the handful of values that seeds give.

    Args:
        bounds: what the mean can be, (0, 1) for an accuracy. The spread of an accuracy shrinks towards its bounds, so
            the interval there has the shape of Wilson's with Student's quantile; Student's own covers too little near
            1.
        trials: questions that each value is an accuracy of. Equal values, which show no spread, then have Wilson's
            interval of so many questions.

    One value has no spread to judge by, nor have equal ones with bounds and no trials: their interval is all that
    `bounds` allow.
    """
    array = finite(values)
    n, mean = len(array), float(np.mean(array))
    wrong = 0 if trials is None else n * trials * min(mean - bounds[0], bounds[1] - mean) / (bounds[1] - bounds[0])
    interval = partial(Interval, mean, n=n, level=level, few=n == 1 or (trials is not None and wrong < FEW_EVENTS))
    if n == 1:
        return interval(low=bounds[0], high=bounds[1])
    error, t = array.std(ddof=1) / np.sqrt(n), scipy_stats.t.ppf((1 + level) / 2, n - 1)
    if not np.isfinite(bounds).all():
        low, high = np.clip([mean - t * error, mean + t * error], *bounds)
        return interval(low=float(low), high=float(high))
    span = bounds[1] - bounds[0]
    p = min(max((mean - bounds[0]) / span, 0.0), 1.0)
    if np.ptp(array) <= 1e-12 * span:
        if trials is None:
            return interval(low=bounds[0], high=bounds[1])
        scale = scipy_stats.norm.ppf((1 + level) / 2) ** 2 / trials
    else:
        scale = (t * error / span) ** 2 / (p * (1 - p))
    low, high = (bounds[0] + span * float(edge[0]) for edge in wilson(np.array([p]), np.array([scale])))
    return interval(low=min(low, mean), high=max(high, mean))


def finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """`values` as float64.

    Raises:
        DataError: not a list, no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise DataError(f"values of shape {array.shape}: expected a non-empty list of numbers")
    if not np.isfinite(array).all():
        raise DataError(f"value {int((~np.isfinite(array)).nonzero()[0][0])} is not finite")
    return array
