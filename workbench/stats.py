"""Permutation nulls, and with them all statistics of the analyses.

The intervals of means are those of workbench/intervals.py, the paired tests those of workbench/paired.py, the steps to
a level those of workbench/reached.py; all are imported from here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.intervals import Interval as Interval
from workbench.intervals import Kind as Kind
from workbench.intervals import finite
from workbench.intervals import mean_interval as mean_interval
from workbench.intervals import mean_intervals as mean_intervals
from workbench.intervals import t_interval as t_interval
from workbench.metrics.alignment import MAX_PAIRED_ROWS, METRICS, Array, Metric, check_same_rows
from workbench.paired import ROUNDING
from workbench.paired import Paired as Paired
from workbench.paired import bootstrap_ci as bootstrap_ci
from workbench.paired import half_splits as half_splits
from workbench.paired import holm as holm
from workbench.paired import jackknife_ci as jackknife_ci
from workbench.paired import paired_columns as paired_columns
from workbench.paired import paired_differences as paired_differences
from workbench.paired import paired_test as paired_test
from workbench.paired import sign_flip as sign_flip
from workbench.paired import split_half_ci as split_half_ci
from workbench.paired import split_half_test as split_half_test
from workbench.paired import sums_interval as sums_interval
from workbench.reached import Reached as Reached
from workbench.reached import first_reached as first_reached
from workbench.reached import steps_reached as steps_reached


@dataclass(frozen=True)
class Null:
    """The distribution of a metric when the pairing of x and y is broken.

    Attributes:
        mean: mean of the nulls.
        q95: their 95th percentile.
        p: share of nulls that are at least as large as the observed value, which counts as one of them (add-one).
    """

    mean: float
    q95: float
    p: float


def null_of(value: float, nulls: Sequence[float] | np.ndarray) -> Null:
    """Summarize permuted values and compare them with the observed one; values equal up to rounding count as equal."""
    array = finite(nulls)
    as_large = array >= value - ROUNDING * max(abs(value), float(np.abs(array).max()))
    return Null(float(array.mean()), float(np.quantile(array, 0.95)), float((1 + as_large.sum()) / (len(array) + 1)))


def permutation_null(
    metric: Callable[..., float], x: Array, y: Array, *, n: int = 100, seed: int = 0, **options: int
) -> Null:
    """Return the distribution of `metric(x, y)` when the rows of y are shuffled: its chance level for this n, d and k.

    For a metric of the registry, x and y are prepared once, and only the order of the prepared y changes.

    Args:
        n: number of permutations.
        options: options of the metric, such as k.
    """
    check_same_rows(x, y)
    value, orders = metric(x, y, **options), permutations(len(y), n, [seed])
    registered = next((entry for entry in map(METRICS.get, METRICS) if metric in (entry, entry.function)), None)
    too_large = registered is not None and registered.square and len(x) > MAX_PAIRED_ROWS
    # with options such as cka's unbiased=False it is another metric than the registered one
    if registered is None or too_large or set(options) - {registered.option}:
        return null_of(value, [metric(x, y[order], **options) for order in orders])
    option = options.get(registered.option, 10)
    prepared_x, prepared_y = registered.prepare(x, option, "x", 0), registered.prepare(y, option, "y", 1)
    return null_of(value, null_scores(registered, [prepared_x], prepared_y, orders)[:, 0])


def null_scores(metric: Metric, xs: Sequence[Any], y: Any, orders: Int[Tensor, "draw *batch n"]) -> np.ndarray:
    """Return the scores of prepared `xs` against permuted copies of prepared `y`, (draw, x, *batch).

    The permutations are the same for all `xs`.
    """
    permuted = map(y.permuted, orders)
    return np.stack([np.stack([metric.score(x, shuffled).cpu().numpy() for x in xs]) for shuffled in permuted])


def permutations(n: int, draws: int, seed: Sequence[int]) -> Int[Tensor, "draw n"]:
    """Return `draws` random permutations of 0 to n - 1.

    `seed` is a sequence of numbers, such as (seed, number of the image), so that the permutations for an image do not
    depend on its batch.
    """
    return torch.from_numpy(np.random.default_rng(list(seed)).random((draws, n)).argsort(axis=1))
