"""How alike two representations of the same n things are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.neighbors import Neighbors, nearest_neighbors, unit_rows
from workbench.registry import Registry

Array = Tensor | np.ndarray
METRICS: Registry[Callable[..., float]] = Registry("metric")
MIN_ROWS = 4  # the unbiased HSIC divides by n (n - 3)
MAX_PAIRED_ROWS = 8192


@METRICS.register("cknna")
def cknna(x: Array, y: Array, *, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of `x` (n, d1) and `y` (n, d2), rows in the same order.

    Inner-product kernels on L2-normalised rows, masked to the pairs (i, j) where j is among the k nearest neighbours of i on both sides
    (i itself excluded); unbiased HSIC of the masked kernels over the root of the two self terms, without an epsilon (Huh et al. 2024, The Platonic
    Representation Hypothesis, appendix). The mask is directed, so the masked kernels are not symmetric and the first HSIC term is
    sum_ij K_ij L_ji, and exchanging x and y changes the value a little. 1 for identical representations; chance is above 0 and depends on n, d and k,
    so read it against `permutation_null`.

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


@METRICS.register("cka")
def cka(x: Array, y: Array, *, unbiased: bool = True) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, eq. 2 and 4), by default with the unbiased HSIC (Song et al. 2012, eq. 5).

    1 for representations that are equal up to rotation, shift and scale. The unbiased estimate is 0 on average for independent representations and can be
    below 0; the biased one grows with d / n even then.  Computed from d x d products, never from n x n kernels.

    Raises:
        DataError: different n, n < 4, a value that is not finite, or a representation whose rows are all alike.
    """
    check_same_rows(x, y)
    first, second = _centred(x, "x"), _centred(y, "y")
    hsic = _unbiased_linear_hsic if unbiased else lambda a, b: (a.T @ b).pow(2).sum()
    scale = hsic(first, first) * hsic(second, second)
    if not scale > 0:
        raise DataError("CKA is undefined: the HSIC of a representation with itself is not positive (too few rows, or all rows alike)")
    return float(hsic(first, second) / scale.sqrt())


def _unbiased_linear_hsic(x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """Eq. 5 of Song et al. for K = x x^T and L = y y^T with zero diagonals, without forming them."""
    n, own_x, own_y = len(x), x.pow(2).sum(1), y.pow(2).sum(1)
    rows_x, rows_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    traced = (x.T @ y).pow(2).sum() - own_x @ own_y
    return (traced + rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2)) - 2 * (rows_x @ rows_y) / (n - 2)) / (n * (n - 3))


@METRICS.register("mutual_knn")
def mutual_knn(x: Array, y: Array, *, k: int = 10) -> float:
    """Mean share of a thing's k nearest neighbours (cosine) that both representations agree on (Huh et al. 2024, eq. 11); chance is k / (n - 1).

    Raises:
        DataError: as `cknna`.
    """
    check_same_rows(x, y)
    first, second = nearest_neighbors(x, k, name="x"), nearest_neighbors(y, k, name="y")
    slot = torch.searchsorted(second.index, first.index).clamp_max(k - 1)
    return float((second.index.gather(-1, slot) == first.index).double().mean())


@METRICS.register("svcca")
def svcca(x: Array, y: Array, *, dim: int = 10) -> float:
    """Mean canonical correlation of the first `dim` principal components of both sides (Raghu et al. 2017).

    1 for representations whose leading subspaces are the same up to an invertible linear map. Chance grows with dim / n (about sqrt(dim / n)).

    Raises:
        DataError: different n, a value that is not finite, or fewer than `dim` independent directions on a side.
    """
    check_same_rows(x, y)
    bases = []
    for name, values in (("x", _centred(x, "x")), ("y", _centred(y, "y"))):
        u, scale, _ = torch.linalg.svd(values, full_matrices=False)
        rank = int((scale > scale[0] * 1e-7).sum()) if scale[0] > 0 else 0
        if not 1 <= dim <= rank:
            raise DataError(f"dim is {dim}: expected 1 to {rank}, the independent directions of {name}")
        bases.append(u[:, :dim])
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).clamp_max(1).mean())


@METRICS.register("rsa")
def rsa(x: Array, y: Array) -> float:
    """Representational similarity analysis: Spearman correlation of all pairwise cosine similarities (Kriegeskorte et al. 2008); chance is 0.

    Raises:
        DataError: different n, more than 8192 rows (it needs every pair), a value that is not finite, a row of zeros, or similarities that are all equal.
    """
    check_same_rows(x, y)
    if len(x) > MAX_PAIRED_ROWS:
        raise DataError(f"{len(x)} rows: RSA compares every pair, expected at most {MAX_PAIRED_ROWS}")
    upper = torch.triu_indices(len(x), len(x), 1)
    pairs = [(rows @ rows.T)[upper[0], upper[1]].numpy() for rows in (unit_rows(v, name).double() for name, v in (("x", x), ("y", y)))]
    if any(np.ptp(values) < 1e-12 for values in pairs):
        raise DataError("RSA is undefined: all pairs of a representation are equally similar")
    return float(spearmanr(*pairs).statistic)


def _centred(values: Array, name: str) -> Float[Tensor, "n d"]:
    rows = torch.as_tensor(values).detach().double()
    if not torch.isfinite(rows).all():
        raise DataError(f"{name} has a value that is not finite in row {int((~torch.isfinite(rows)).any(1).nonzero()[0])}")
    rows = rows - rows.mean(0)
    return rows / rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)  # no metric here depends on scale


def alignment_matrix(xs: Mapping[str, Array], ys: Mapping[str, Array], *, metric: str = "cknna", k: int = 10) -> pd.DataFrame:
    """A metric between every representation in `xs` (rows) and every one in `ys` (columns); for CKNNA the neighbours of each are found once.

    Args:
        k: neighbours, for the metrics that have them.

    Raises:
        UnknownNameError: a metric that does not exist.
        DataError: as the metric, naming the representation.
    """
    function = METRICS.get(metric)
    for name, x in xs.items():
        for other, y in ys.items():
            if x.shape[:-1] != y.shape[:-1]:
                raise DataError(f"'{name}' has {x.shape[-2]} rows and '{other}' has {y.shape[-2]}: expected the same things in the same order")
    for name, values in (*xs.items(), *ys.items()):
        if len(values) < MIN_ROWS:
            raise DataError(f"'{name}' has {len(values)} rows: expected at least {MIN_ROWS}")
    if metric == "cknna":
        near_x, near_y = ({name: nearest_neighbors(v, k, name=f"'{name}'") for name, v in side.items()} for side in (xs, ys))
        scores = [[float(cknna_from_neighbors(x, y)) for y in near_y.values()] for x in near_x.values()]
    else:
        options = {"k": k} if "k" in signature(function).parameters else {}
        scores = [[function(x, y, **options) for y in ys.values()] for x in xs.values()]
    return pd.DataFrame(scores, index=list(xs), columns=list(ys))
