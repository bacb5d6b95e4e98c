"""Sums and moments of values by stratum and unit, which confidence intervals are computed from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from workbench.errors import DataError

Kind = Literal["proportion", "difference", "real"]
"""The kind of a quantity.

proportion: a mean of values from 0 to 1, such as an accuracy; difference: a mean of differences of two such values,
from -1 to 1; real: anything else."""


@dataclass(frozen=True)
class Sums:
    """Sums of values by stratum, unit and column, from which intervals are computed.

    The estimate of a column is the mean over strata of the mean of each stratum.

    Attributes:
        count: number of values.
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
        weights: Sequence[float] | None = None,
    ) -> Sums:
        """Sum the rows by unit and stratum; NaN counts as a missing value.

        Args:
            values: one row per value, one column per quantity.
            groups: the unit of each row; None makes each row a unit of its own.
            strata: the stratum of each row; None puts all rows into one.
            weights: how many values each row counts as; None is one each.

        Raises:
            DataError: `groups` or `strata` does not have one label per row.
        """
        present = ~np.isnan(values)
        filled = np.where(present, values, 0.0)
        unit = _codes(np.arange(len(values)) if groups is None else groups, len(values))
        stratum = _codes(strata, len(values))
        weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
        arrays = []
        for part in (present, filled, filled**2, np.abs(filled)):
            array = np.zeros((int(stratum.max()) + 1, int(unit.max()) + 1, values.shape[1]))
            np.add.at(array, (stratum, unit), part * weight[:, None])
            arrays.append(array)
        return cls(*arrays)


def _codes(labels: Sequence[Hashable] | np.ndarray | None, n: int) -> np.ndarray:
    """Number the labels 0, 1, ... in the order of their first appearance; None is n zeros."""
    if labels is None:
        return np.zeros(n, dtype=int)
    if len(labels) != n:
        raise DataError(f"{len(labels)} labels for {n} values: expected one label per value")
    plain_labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(label, len(codes)) for label in plain_labels])


@dataclass(frozen=True)
class Moments:
    """The estimate of each column, its variance under two assumptions, and what else its interval depends on.

    Attributes:
        mean: the estimate.
        between: variance of the estimate from the spread of units: the sum of squared residuals of the units, each
            divided by 1 - the unit's weight (CR2 of Bell and McCaffrey 2002 for a mean).
        within: variance of the estimate if all values were independent.
        spread: the variance of one value that the score interval assumes, p (1 - p) for proportions.
        positive, negative: means of the positive and of the negative parts of the values.
        events: number of values that differ from the most common value: wrong (or right) answers; for differences,
            changed (or unchanged) answers.
        units: number of units with a value.
        kish: effective number of units, 1 / sum of their squared weights (Kish 1965).
        clustering: mean over values of the number of values in the same unit.
        tail: effective number of units that the spread comes from, (sum e^2)^2 / sum e^4 of the residuals e.
        skewness: skewness of the residuals.
        discrete: whether all values are 0, 1 or -1; the mean then determines the spread of independent values.
    """

    mean: Float[np.ndarray, " column"]
    between: Float[np.ndarray, " column"]
    within: Float[np.ndarray, " column"]
    spread: Float[np.ndarray, " column"]
    positive: Float[np.ndarray, " column"]
    negative: Float[np.ndarray, " column"]
    events: Float[np.ndarray, " column"]
    units: Int[np.ndarray, " column"]
    kish: Float[np.ndarray, " column"]
    clustering: Float[np.ndarray, " column"]
    tail: Float[np.ndarray, " column"]
    skewness: Float[np.ndarray, " column"]
    discrete: np.ndarray


def moments(sums: Sums, kind: Kind) -> Moments:
    """Return the moments of every column.

    The mean over strata leaves out strata without values; the mean of a column without values is NaN.
    """
    n = sums.count.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = 1 / (n * (n > 0).sum(axis=0))  # weight of one value in the estimate, (stratum, column)
        weight = np.where(n > 0, weight, 0.0)
        means = np.where(n > 0, sums.total.sum(axis=1) / n, 0.0)
        variances = np.where(n > 0, (sums.square.sum(axis=1) / n - means**2).clip(min=0), 0.0)
    mean = (weight * sums.total.sum(axis=1)).sum(axis=0)
    spread = (weight * n * variances).sum(axis=0)
    # shrinkage: two values with the mean spread are added to each stratum, whose few values may agree by chance
    pooled = np.where(n > 0, (n * variances + 2 * spread) / (n + 2), 0.0)
    residual = (weight[:, None] * (sums.total - means[:, None] * sums.count)).sum(axis=0)
    share = (weight[:, None] * sums.count).sum(axis=0)
    squares, fourth = (residual**2).sum(axis=0), (residual**4).sum(axis=0)
    size = (weight * sums.size.sum(axis=1)).sum(axis=0)
    units = (sums.count.sum(axis=0) > 0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        kish = 1 / (share**2).sum(axis=0)
        third_moment = (residual**3).sum(axis=0) / units
        skewness = np.where(squares > 0, third_moment / (squares / units) ** 1.5, 0.0)
        tail = np.where(squares > 0, squares**2 / fourth, 1.0)
        between = np.where(share < 1, residual**2 / (1 - share), 0.0).sum(axis=0)
    total, absolute = sums.total.sum(axis=(0, 1)), sums.size.sum(axis=(0, 1))
    positive, negative = (absolute + total) / 2, (absolute - total) / 2
    most_common = np.maximum(np.maximum(positive, negative), n.sum(axis=0) - absolute)
    return Moments(
        mean=np.where(units > 0, mean, np.nan),
        between=between,
        within=(weight**2 * n * pooled).sum(axis=0),
        spread=mean * (1 - mean) if kind == "proportion" else size - mean**2,
        positive=(size + mean) / 2,
        negative=(size - mean) / 2,
        events=n.sum(axis=0) - most_common,
        units=units,
        kish=kish,
        clustering=(share**2).sum(axis=0) / np.maximum((weight**2 * n).sum(axis=0), 1e-300),
        tail=tail,
        skewness=skewness,
        discrete=np.isclose(sums.square.sum(axis=(0, 1)), absolute, rtol=1e-9, atol=0),
    )
