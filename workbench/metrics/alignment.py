"""How similar two representations of the same n samples are.

A representation has one row per sample (an image, a visual token). A score compares how the rows relate to one another
on both sides, so both sides may have different widths. The chance level of most metrics depends on n and on the
representations: read a score against its `permutation_null`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.neighbors import Neighbors, nearest_neighbors, unit_rows
from workbench.registry import Registry

Array = Tensor | np.ndarray
MIN_ROWS = 4  # the unbiased HSIC divides by n (n - 3)
MAX_PAIRED_ROWS = 8192
PREPARED_BYTES = 2**30  # of memory for prepared n x n forms at a time
ROUNDING = 1e-10  # an unbiased HSIC below this share of the kernel's sum of squares is 0 up to rounding


@dataclass(frozen=True)
class Metric:
    """A metric, split so that each of many representations is prepared once, then compared and permuted cheaply.

    Attributes:
        label: its name on an axis.
        function: (x, y, **{option: value}) -> float, for two representations; calling the metric calls it.
        prepare: (values (*batch, n, d), option, name, side) -> prepared form. The form has a method `permuted(order)`,
            which returns it with row i being what was row order[i]. `name` is what errors call the representation.
            `side` is 0 for x and 1 for y: ties between neighbors are broken at random, independently on both sides.
        score: two prepared forms -> (*batch).
        option: name of its one option (`k` or `dim`), empty where it has none.
        square: whether the prepared form holds n x n numbers.
    """

    label: str
    function: Callable[..., float]
    prepare: Callable[[Array, int, str, int], Any]
    score: Callable[[Any, Any], Float[Tensor, "*batch"]]
    option: str = ""
    square: bool = False

    def __call__(self, x: Array, y: Array, **options: int) -> float:
        return self.function(x, y, **options)

    def max_batch(self, n: int, forms: int) -> int:
        """Return how many comparisons of n rows, each with `forms` prepared forms, fit in memory (at least 1)."""
        return max(1, PREPARED_BYTES // (8 * n * n * forms)) if self.square else 2**20


METRICS: Registry[Metric] = Registry("metric", "metrics", Metric)


def cknna(x: Array, y: Array, *, k: int = 10) -> float:
    """Compute the centered kernel nearest-neighbor alignment of `x` (n, d1) and `y` (n, d2), rows in the same order.

    The kernels are inner products of L2-normalized rows, masked to the pairs (i, j) where j is among the k nearest
    neighbors of i on both sides (i itself excluded). The score is the unbiased HSIC of the masked kernels, divided by
    the root of the product of the two self terms, without an epsilon (Huh et al. 2024, The Platonic Representation
    Hypothesis, appendix). The mask is directed, so the masked kernels are not symmetric: the first HSIC term is
    sum_ij K_ij L_ji, and exchanging x and y changes the value a little.

    Identical representations without equal rows score 1. The chance level is above 0 and depends on n, d and k: read
    the value against `permutation_null`.

    The value can be above 1 and below 0. The numerator's kernels are masked to the neighbors shared by both sides, but
    each self term's kernel to that side's own neighbors, so the Cauchy-Schwarz inequality does not bound the ratio.
    This shows where n is hardly larger than k: 6 rows and k = 4 can give 2.

    Ties among equal rows are broken at random with a fixed seed, independently on both sides. Rows that are equal on
    both sides (a padded bar, a white page) therefore agree only as often as by chance, and a representation with equal
    rows scores below 1 with itself.

    Raises:
        DataError: different n, n <= k, n < 4, a value that is not finite, a row of zeros, rows that all point the same
            way, or a self term that is not positive.
    """
    return _single("cknna", x, y, k)


def _single(name: str, x: Array, y: Array, option: int = 0) -> float:
    """Return the score of two representations, computed as for many: prepare both, then compare."""
    check_same_rows(x, y)
    metric = METRICS.get(name)
    return float(metric.score(metric.prepare(x, option, "x", 0), metric.prepare(y, option, "y", 1)))


def check_same_rows(x: Array, y: Array) -> None:
    """Raise unless `x` and `y` have the same number of rows, enough for an unbiased estimate."""
    for name, values in (("x", x), ("y", y)):
        if values.ndim != 2:
            raise DataError(f"{name} has shape {tuple(values.shape)}: expected (n, d)")
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} rows and y has {len(y)}: expected the same samples in the same order")
    if len(x) < MIN_ROWS:
        raise DataError(f"x and y have {len(x)} rows: expected at least {MIN_ROWS}")


@dataclass(frozen=True)
class Masked:
    """Neighbors, and the self term: the unbiased HSIC, with itself, of the kernel masked to them."""

    neighbors: Neighbors
    self_hsic: Float[Tensor, "*batch"]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Masked:
        """Return the same rows in another order; the self term does not depend on the order."""
        return Masked(self.neighbors.permuted(order), self.self_hsic)


def _masked(x: Array, k: int, name: str, side: int = 0) -> Masked:
    neighbors = nearest_neighbors(x, k, name=name, side=side)
    kernel = neighbors.kernel.double()
    self_hsic = _hsic(neighbors, kernel, kernel)
    if not (self_hsic * neighbors.n * (neighbors.n - 3) > ROUNDING * kernel.pow(2).sum((-2, -1))).all():
        raise DataError(
            f"CKNNA is undefined: the unbiased HSIC of {name} with itself is not positive (too few rows, or all rows"
            " equal)"
        )
    return Masked(neighbors, self_hsic)


def _cknna(x: Masked, y: Masked) -> Float[Tensor, "*batch"]:
    """Return the CKNNA of representations whose neighbors are known, in O(n k log k) and float64."""
    agree, slot = _agreement(x.neighbors, y.neighbors)
    kx, ky = x.neighbors.kernel.double() * agree, y.neighbors.kernel.gather(-1, slot).double() * agree
    return _hsic(x.neighbors, kx, ky) / (x.self_hsic * y.self_hsic).sqrt()


def _agreement(x: Neighbors, y: Neighbors) -> tuple[Bool[Tensor, "*batch n k"], Int[Tensor, "*batch n k"]]:
    """Return whether each neighbor in x is a neighbor in y too, and its position in y's list."""
    slot = torch.searchsorted(y.index, x.index).clamp_max(y.k - 1)
    return y.index.gather(-1, slot) == x.index, slot


def _hsic(
    pairs: Neighbors, kx: Float[Tensor, "*batch n k"], ky: Float[Tensor, "*batch n k"]
) -> Float[Tensor, "*batch"]:
    """Return the unbiased HSIC (Song et al. 2012, eq. 5) of two sparse kernels.

    The kernels have values at the pairs (i, pairs.index[i, :]) and are 0 elsewhere.

    [sum_ij K_ij L_ji + sum K sum L / ((n-1)(n-2)) - 2/(n-2) sum_j (sum_i K_ij)(sum_m L_jm)] / (n (n-3))
    """
    n, (slot, mutual) = pairs.n, pairs.back
    flat_x, flat_y = kx.flatten(-2), ky.flatten(-2)
    trace = (flat_x * flat_y.gather(-1, slot) * mutual).sum(-1)
    columns = torch.zeros(*flat_x.shape[:-1], n, dtype=torch.float64, device=flat_x.device).scatter_add_(
        -1, pairs.index.flatten(-2), flat_x
    )
    cross = (columns * ky.sum(-1)).sum(-1)
    total = flat_x.sum(-1) * flat_y.sum(-1)
    return (trace + total / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def cka(x: Array, y: Array, *, unbiased: bool = True) -> float:
    """Compute linear centered kernel alignment (Kornblith et al. 2019, eq. 2 and 4).

    Representations that are equal up to rotation, shift and scale score 1. The unbiased estimate (HSIC by Song et al.
    2012, eq. 5) is 0 on average for independent representations, so it can be below 0; the biased one grows with d / n
    even then. Computed from d x d products, never from n x n kernels.

    Args:
        x: (n, d1).
        y: (n, d2), rows in the same order.
        unbiased: whether to use the unbiased HSIC.

    Raises:
        DataError: different n, n < 4, a value that is not finite, or a representation whose rows are all equal.
    """
    check_same_rows(x, y)
    first, second = _centered(x, "x"), _centered(y, "y")
    hsic = _unbiased_linear_hsic if unbiased else lambda a, b: (a.T @ b).pow(2).sum()
    self_hsics = []
    for name, side in (("x", first), ("y", second)):
        self_hsics.append(hsic(side, side))
        squares = (side.T @ side).pow(2).sum()
        if not self_hsics[-1] * (len(x) * (len(x) - 3) if unbiased else 1) > ROUNDING * squares:
            raise DataError(
                f"CKA is undefined: the HSIC of {name} with itself is not positive (too few rows, or all rows equal)"
            )
    return float(hsic(first, second) / (self_hsics[0] * self_hsics[1]).sqrt())


def _unbiased_linear_hsic(x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """Return eq. 5 of Song et al. for K = x x^T and L = y y^T with zero diagonals, without forming them."""
    n, diagonal_x, diagonal_y = len(x), x.pow(2).sum(1), y.pow(2).sum(1)
    rows_x, rows_y = x @ x.sum(0) - diagonal_x, y @ y.sum(0) - diagonal_y
    trace = (x.T @ y).pow(2).sum() - diagonal_x @ diagonal_y
    cross = rows_x @ rows_y
    return (trace + rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


@dataclass(frozen=True)
class Square:
    """One number for each pair of rows, (n, n), with zeros on the diagonal and length 1 as a vector.

    The score of two such forms is their inner product.
    """

    values: Float[Tensor, "*batch n n"]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Square:
        """Return the same rows in another order."""
        order, n = order.to(self.values.device), order.shape[-1]
        flat = (order[..., :, None] * n + order[..., None, :]).flatten(-2)
        return Square(self.values.flatten(-2).gather(-1, flat).unflatten(-1, (n, n)))


def _inner(x: Square, y: Square) -> Float[Tensor, "*batch"]:
    return torch.linalg.vecdot(x.values.flatten(-2), y.values.flatten(-2))


def _centered_gram(x: Array, _: int, name: str, __: int = 0) -> Square:
    """Return the U-centered Gram matrix (Szekely and Rizzo 2014, eq. 3.2), divided by its norm.

    The inner product of two U-centered matrices is n (n - 3) times the unbiased HSIC (prop. 1 there).
    """
    _check_pairs(x, "CKA")
    rows = _centered(x, name)
    n = rows.shape[-2]
    gram = rows @ rows.mT
    gram_norm = torch.linalg.matrix_norm(gram)[..., None, None]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    sums = gram.sum(-1, keepdim=True)
    gram = gram - (sums + sums.mT) / (n - 2) + sums.sum(-2, keepdim=True) / ((n - 1) * (n - 2))
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    norm = torch.linalg.matrix_norm(gram)[..., None, None]
    if not (norm > ROUNDING**0.5 * gram_norm).all():
        raise DataError(
            f"CKA is undefined: the HSIC of {name} with itself is not positive (too few rows, or all rows equal)"
        )
    return Square(gram / norm)


def _check_pairs(x: Array, label: str) -> None:
    if x.shape[-2] > MAX_PAIRED_ROWS:
        raise DataError(f"{x.shape[-2]} rows: {label} compares every pair of rows, expected at most {MAX_PAIRED_ROWS}")


def mutual_knn(x: Array, y: Array, *, k: int = 10) -> float:
    """Compute the mean share of a row's k nearest neighbors that are the same on both sides.

    Neighbors are by cosine similarity (Huh et al. 2024, eq. 11). Chance is k / (n - 1).

    Raises:
        DataError: as `cknna`.
    """
    return _single("mutual_knn", x, y, k)


def _neighbors(x: Array, k: int, name: str, side: int = 0) -> Neighbors:
    return nearest_neighbors(x, k, name=name, side=side)


def _mutual_knn(x: Neighbors, y: Neighbors) -> Float[Tensor, "*batch"]:
    return _agreement(x, y)[0].double().mean((-2, -1))


def svcca(x: Array, y: Array, *, dim: int = 10) -> float:
    """Compute the mean canonical correlation of the first `dim` principal components of both sides.

    Source: Raghu et al. 2017. Representations whose leading subspaces are equal up to an invertible linear map score
    1. Chance grows with dim / n (about sqrt(dim / n)).

    Raises:
        DataError: different n, a value that is not finite, or fewer than `dim` independent directions on a side.
    """
    return _single("svcca", x, y, dim)


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of the first principal components' scores."""

    values: Float[Tensor, "*batch n dim"]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Basis:
        """Return the same rows in another order."""
        return Basis(
            self.values.gather(-2, order[..., None].to(self.values.device).expand(*order.shape, self.values.shape[-1]))
        )


def _principal(x: Array, dim: int, name: str, _: int = 0) -> Basis:
    u, singular, _ = torch.linalg.svd(_centered(x, name), full_matrices=False)
    rank = int(((singular > singular[..., :1] * 1e-7) & (singular > 0)).sum(-1).min())
    if not 1 <= dim <= rank:
        raise DataError(f"dim is {dim}: expected 1 to {rank}, the number of independent directions of {name}")
    return Basis(u[..., :dim])


def _svcca(x: Basis, y: Basis) -> Float[Tensor, "*batch"]:
    return torch.linalg.svdvals(x.values.mT @ y.values).clamp_max(1).mean(-1)


def rsa(x: Array, y: Array) -> float:
    """Compute the Spearman correlation of all pairwise cosine similarities.

    This is representational similarity analysis (Kriegeskorte et al. 2008). Chance is 0.

    Raises:
        DataError: different n, more than 8192 rows (it needs every pair), a value that is not finite, a row of zeros,
            or similarities that are all equal.
    """
    return _single("rsa", x, y)


def _ranked(x: Array, _: int, name: str, __: int = 0) -> Square:
    """Return the centered ranks of all pairwise cosine similarities, as a symmetric matrix of norm 1.

    The Spearman correlation is the Pearson correlation of ranks, so it is the inner product of two such matrices.
    """
    from scipy.stats import rankdata  # imported here because it takes half a second of every command

    _check_pairs(x, "RSA")
    rows = unit_rows(torch.as_tensor(x).double(), name)
    n = rows.shape[-2]
    upper = torch.triu_indices(n, n, 1, device=rows.device)
    # rounded, so that pairs of equal rows have equal ranks
    pairs = (rows @ rows.mT)[..., upper[0], upper[1]].round(decimals=12)
    if (pairs.amax(-1) == pairs.amin(-1)).any():
        raise DataError(f"RSA is undefined: all pairs of {name} are equally similar")
    ranks = torch.from_numpy(rankdata(pairs.cpu().numpy(), axis=-1)).to(rows.device)
    ranks = ranks - ranks.mean(-1, keepdim=True)
    values = torch.zeros(*rows.shape[:-1], n, dtype=torch.float64, device=rows.device)
    values[..., upper[0], upper[1]] = values[..., upper[1], upper[0]] = (
        ranks / (2 * ranks.pow(2).sum(-1, keepdim=True)).sqrt()
    )
    return Square(values)


def _centered(values: Array, name: str) -> Float[Tensor, "*batch n d"]:
    """Return the rows minus their mean, in float64, scaled to a largest magnitude of 1 (no metric depends on scale)."""
    rows = torch.as_tensor(values).detach().double()
    if not torch.isfinite(rows).all():
        row = int((~torch.isfinite(rows)).any(-1).flatten().nonzero()[0])
        raise DataError(f"{name} has a value that is not finite in row {row}")
    centered = rows - rows.mean(-2, keepdim=True)
    largest, largest_before = (x.abs().amax((-2, -1), keepdim=True) for x in (centered, rows))
    all_equal = largest <= 1e-13 * largest_before  # up to rounding
    return torch.where(all_equal, 0, centered / largest.clamp_min(torch.finfo(rows.dtype).tiny))


METRICS.add("cknna", Metric("CKNNA", cknna, _masked, _cknna, option="k"))
METRICS.add("cka", Metric("unbiased CKA", cka, _centered_gram, _inner, square=True))
METRICS.add("mutual_knn", Metric("mutual kNN", mutual_knn, _neighbors, _mutual_knn, option="k"))
METRICS.add("svcca", Metric("SVCCA", svcca, _principal, _svcca, option="dim"))
METRICS.add("rsa", Metric("RSA", rsa, _ranked, _inner, square=True))


def alignment_matrix(
    xs: Mapping[str, Array], ys: Mapping[str, Array], *, metric: str = "cknna", k: int = 10, dim: int = 10
) -> pd.DataFrame:
    """Compute a metric between every representation in `xs` and every one in `ys`, and prepare each only once.

    Args:
        xs: {name: (n, d)}, the rows of the result.
        ys: {name: (n, d)}, the columns of the result.
        metric: name of the metric.
        k: number of neighbors, for the metrics that use them.
        dim: number of principal components, for SVCCA.

    Raises:
        UnknownNameError: a metric that does not exist.
        DataError: as the metric, naming the representation.
    """
    chosen = METRICS.get(metric)
    for name, x in xs.items():
        for other, y in ys.items():
            if x.shape[:-1] != y.shape[:-1]:
                raise DataError(
                    f"'{name}' has {x.shape[-2]} rows and '{other}' has {y.shape[-2]}: expected the same samples in"
                    " the same order"
                )
    for name, values in (*xs.items(), *ys.items()):
        if len(values) < MIN_ROWS:
            raise DataError(f"'{name}' has {len(values)} rows: expected at least {MIN_ROWS}")
    option = {"k": k, "dim": dim}.get(chosen.option, 0)
    prepared = [
        {name: chosen.prepare(v, option, f"'{name}'", number) for name, v in side.items()}
        for number, side in enumerate((xs, ys))
    ]
    scores = [[float(chosen.score(x, y)) for y in prepared[1].values()] for x in prepared[0].values()]
    return pd.DataFrame(scores, index=list(xs), columns=list(ys))
