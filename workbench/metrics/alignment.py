"""How alike two representations of the same n things are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.neighbors import Neighbors, nearest_neighbors
from workbench.registry import Registry

Array = Tensor | np.ndarray
METRICS: Registry[Callable[..., float]] = Registry("metric")
MIN_ROWS = 4  # the unbiased HSIC divides by n (n - 3)


@METRICS.register("cknna")
def cknna(x: Array, y: Array, *, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of `x` (n, d1) and `y` (n, d2), rows in the same order.

    Inner-product kernels on L2-normalised rows, masked to the pairs (i, j) where j is among the k nearest neighbours of i on both sides
    (i itself excluded); unbiased HSIC of the masked kernels over the root of the two self terms, without an epsilon (Huh et al. 2024, The Platonic
    Representation Hypothesis, appendix). The mask is directed, so the masked kernels are not symmetric and the first HSIC term is
    sum_ij K_ij L_ji. 1 for identical representations; chance is above 0 and depends on n, d and k, so read it against `permutation_null`.

    Equal similarities are ranked by row number, so duplicate rows give a defined value that depends on their order.

    Raises:
        DataError: different n, n <= k, n < 4, a value that is not finite, a row of zeros, or a self term that is not positive.
    """
    check_same_rows(x, y)
    return float(cknna_from_neighbors(nearest_neighbors(x, k, name="x"), nearest_neighbors(y, k, name="y")))


def check_same_rows(x: Array, y: Array) -> None:
    """Raise unless `x` and `y` describe the same number of things, enough of them for an unbiased estimate."""
    for name, values in (("x", x), ("y", y)):
        if values.ndim != 2:
            raise DataError(f"{name} has shape {tuple(values.shape)}: expected (n, d)")
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} rows and y has {len(y)}: expected the same things in the same order")
    if len(x) < MIN_ROWS:
        raise DataError(f"x and y have {len(x)} rows: expected at least {MIN_ROWS}")


def cknna_from_neighbors(x: Neighbors, y: Neighbors) -> Float[Tensor, "*batch"]:
    """CKNNA of representations whose neighbours are known, in O(n k log(n k)) and float64; leading axes are independent problems."""
    scale = self_term(x) * self_term(y)
    if not (scale > 0).all():
        raise DataError("CKNNA is undefined: the unbiased HSIC of a representation with itself is not positive (too few rows, or all rows alike)")
    return cross_term(x, y) / scale.sqrt()


def self_term(x: Neighbors) -> Float[Tensor, "*batch"]:
    """Unbiased HSIC of one neighbour-masked kernel with itself."""
    return _hsic(x, x.kernel.double(), x.kernel.double())


def cross_term(x: Neighbors, y: Neighbors, order: Int[Tensor, "*batch n"] | None = None) -> Float[Tensor, "*batch"]:
    """Unbiased HSIC of the two kernels, both masked to the pairs that are neighbours on both sides.

    Args:
        order: pair row i of x with row order[i] of y instead of row i. Nothing is searched again, so a permutation costs O(n k log k).
    """
    index, kernel, wanted = y.index, y.kernel, x.index
    if order is not None:
        rows = order[..., None].expand(*order.shape, y.k)
        index, kernel = index.gather(-2, rows), kernel.gather(-2, rows)
        wanted = order.gather(-1, x.index.flatten(-2)).unflatten(-1, (x.n, x.k))
    slot = torch.searchsorted(index, wanted).clamp_max(y.k - 1)
    agree = index.gather(-1, slot) == wanted
    return _hsic(x, x.kernel.double() * agree, kernel.gather(-1, slot).double() * agree)


def _hsic(pairs: Neighbors, kx: Float[Tensor, "*batch n k"], ky: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch"]:
    """Unbiased HSIC (Song et al. 2012, eq. 5) of two sparse kernels given at the pairs (i, pairs.index[i, :]), zeros for absent pairs.

    [sum_ij K_ij L_ji + sum K sum L / ((n-1)(n-2)) - 2/(n-2) sum_j (sum_i K_ij)(sum_m L_jm)] / (n (n-3))
    """
    n, (slot, mutual) = pairs.n, pairs.back
    flat_x, flat_y = kx.flatten(-2), ky.flatten(-2)
    traced = (flat_x * flat_y.gather(-1, slot) * mutual).sum(-1)
    columns = torch.zeros(*flat_x.shape[:-1], n, dtype=torch.float64).scatter_add_(-1, pairs.index.flatten(-2), flat_x)
    crossed = (columns * ky.sum(-1)).sum(-1)
    total = flat_x.sum(-1) * flat_y.sum(-1)
    return (traced + total / ((n - 1) * (n - 2)) - 2 * crossed / (n - 2)) / (n * (n - 3))


def alignment_matrix(xs: Mapping[str, Array], ys: Mapping[str, Array], *, metric: str = "cknna", k: int = 10) -> pd.DataFrame:
    """CKNNA of every representation in `xs` (rows) with every one in `ys` (columns); the neighbours of each are found once.

    Raises:
        UnknownNameError: a metric that does not exist.
        DataError: as the metric, naming the representation.
    """
    METRICS.get(metric)
    for name, x in xs.items():
        for other, y in ys.items():
            if x.shape[:-1] != y.shape[:-1]:
                raise DataError(f"'{name}' has {x.shape[-2]} rows and '{other}' has {y.shape[-2]}: expected the same things in the same order")
    for name, values in (*xs.items(), *ys.items()):
        if len(values) < MIN_ROWS:
            raise DataError(f"'{name}' has {len(values)} rows: expected at least {MIN_ROWS}")
    near_x = {name: nearest_neighbors(x, k, name=f"'{name}'") for name, x in xs.items()}
    near_y = {name: nearest_neighbors(y, k, name=f"'{name}'") for name, y in ys.items()}
    scores = [[float(cknna_from_neighbors(x, y)) for y in near_y.values()] for x in near_x.values()]
    return pd.DataFrame(scores, index=list(xs), columns=list(ys))
