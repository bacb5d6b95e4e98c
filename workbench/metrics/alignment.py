"""How alike two representations of the same n things are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.neighbors import Neighbors, nearest_neighbors, unit_rows
from workbench.registry import Registry

Array = Tensor | np.ndarray
MIN_ROWS = 4  # the unbiased HSIC divides by n (n - 3)
MAX_PAIRED_ROWS = 8192
PREPARED_BYTES = 2**30  # of n x n forms held at a time
NOTHING = 1e-10  # share of a kernel's squares at which its unbiased HSIC is what rounding leaves of 0


@dataclass(frozen=True)
class Metric:
    """A metric in the parts that a comparison of many representations needs, so that each is prepared once and then
    compared and permuted cheaply.

    Attributes:
        label: its name on an axis.
        function: (x, y, **{option: value}) -> float, for two representations; calling the metric calls it.
        prepare: (values (*batch, n, d), option, name, side) -> prepared form; it has `permuted(order)`, where row i is
            what was row order[i]. `side` is 0 for x and 1 for y: ties of neighbours are broken at random, not alike on
            both sides.
        score: two prepared forms -> (*batch).
        option: name of its one option, `k` or `dim`, or none.
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

    def together(self, n: int, forms: int) -> int:
        """How many problems of n rows can be prepared at a time, where each has so many `forms`; at least 1."""
        return max(1, PREPARED_BYTES // (8 * n * n * forms)) if self.square else 2**20


METRICS: Registry[Metric] = Registry("metric", "metrics", Metric)


def cknna(x: Array, y: Array, *, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of `x` (n, d1) and `y` (n, d2), rows in the same order.

    Inner-product kernels on L2-normalised rows, masked to the pairs (i, j) where j is among the k nearest neighbours of
    i on both sides (i itself excluded); unbiased HSIC of the masked kernels over the root of the two self terms,
    without an epsilon (Huh et al. 2024, The Platonic Representation Hypothesis, appendix). The mask is directed, so the
    masked kernels are not symmetric and the first HSIC term is sum_ij K_ij L_ji, and exchanging x and y changes the
    value a little. 1 for identical representations without equal rows; chance is above 0 and depends on n, d and k, so
    read it against `permutation_null`.

    The value can be above 1, and below 0: the unbiased HSIC is no inner product of one and the same kernel on both
    sides (the numerator's kernels are masked to the neighbours that both share, each self term's to its own
    neighbours), so the inequality of Cauchy and Schwarz does not bound it. That is seen where n is hardly larger than
    k: 6 rows and k = 4 can give 2.

    Ties among equal rows are broken at random, with a fixed seed, and independently on both sides, so equal rows on
    both sides (a padded bar, a white page) agree as often as by chance, and a representation with equal rows scores
    below 1 with itself.

    Raises:
        DataError: different n, n <= k, n < 4, a value that is not finite, a row of zeros, rows that all point the same
            way, or a self term that is not positive.
    """
    return _single("cknna", x, y, k)


def _single(name: str, x: Array, y: Array, option: int = 0) -> float:
    """The score of two representations, by the same parts as that of many."""
    check_same_rows(x, y)
    metric = METRICS.get(name)
    return float(metric.score(metric.prepare(x, option, "x", 0), metric.prepare(y, option, "y", 1)))


def check_same_rows(x: Array, y: Array) -> None:
    """Raise unless `x` and `y` describe the same number of things, enough of them for an unbiased estimate."""
    for name, values in (("x", x), ("y", y)):
        if values.ndim != 2:
            raise DataError(f"{name} has shape {tuple(values.shape)}: expected (n, d)")
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} rows and y has {len(y)}: expected the same things in the same order")
    if len(x) < MIN_ROWS:
        raise DataError(f"x and y have {len(x)} rows: expected at least {MIN_ROWS}")


@dataclass(frozen=True)
class Masked:
    """Neighbours, and the unbiased HSIC of the kernel masked to them with itself."""

    near: Neighbors
    own: Float[Tensor, "*batch"]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Masked:
        """The same things in another order, which leaves the self term as it is."""
        return Masked(self.near.permuted(order), self.own)


def _masked(x: Array, k: int, name: str, side: int = 0) -> Masked:
    near = nearest_neighbors(x, k, name=name, side=side)
    kernel = near.kernel.double()
    own = _hsic(near, kernel, kernel)
    if not (own * near.n * (near.n - 3) > NOTHING * kernel.pow(2).sum((-2, -1))).all():
        raise DataError(
            f"CKNNA is undefined: the unbiased HSIC of {name} with itself is not positive (too few rows, or all rows"
            " alike)"
        )
    return Masked(near, own)


def _cknna(x: Masked, y: Masked) -> Float[Tensor, "*batch"]:
    """CKNNA of representations whose neighbours are known, in O(n k log k) and float64: unbiased HSIC of both kernels
    where both have the neighbour."""
    agree, slot = _agreement(x.near, y.near)
    kx, ky = x.near.kernel.double() * agree, y.near.kernel.gather(-1, slot).double() * agree
    return _hsic(x.near, kx, ky) / (x.own * y.own).sqrt()


def _agreement(x: Neighbors, y: Neighbors) -> tuple[Bool[Tensor, "*batch n k"], Int[Tensor, "*batch n k"]]:
    """Whether each neighbour in x is one in y too, and where it stands there."""
    slot = torch.searchsorted(y.index, x.index).clamp_max(y.k - 1)
    return y.index.gather(-1, slot) == x.index, slot


def _hsic(
    pairs: Neighbors, kx: Float[Tensor, "*batch n k"], ky: Float[Tensor, "*batch n k"]
) -> Float[Tensor, "*batch"]:
    """Unbiased HSIC (Song et al. 2012, eq. 5) of two sparse kernels given at the pairs (i, pairs.index[i, :]), zeros
    for absent pairs.

    [sum_ij K_ij L_ji + sum K sum L / ((n-1)(n-2)) - 2/(n-2) sum_j (sum_i K_ij)(sum_m L_jm)] / (n (n-3))
    """
    n, (slot, mutual) = pairs.n, pairs.back
    flat_x, flat_y = kx.flatten(-2), ky.flatten(-2)
    traced = (flat_x * flat_y.gather(-1, slot) * mutual).sum(-1)
    columns = torch.zeros(*flat_x.shape[:-1], n, dtype=torch.float64, device=flat_x.device).scatter_add_(
        -1, pairs.index.flatten(-2), flat_x
    )
    crossed = (columns * ky.sum(-1)).sum(-1)
    total = flat_x.sum(-1) * flat_y.sum(-1)
    return (traced + total / ((n - 1) * (n - 2)) - 2 * crossed / (n - 2)) / (n * (n - 3))


def cka(x: Array, y: Array, *, unbiased: bool = True) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, eq. 2 and 4), by default with the unbiased HSIC (Song et
    al. 2012, eq. 5).

    1 for representations that are equal up to rotation, shift and scale. The unbiased estimate is 0 on average for
    independent representations and can be
    below 0; the biased one grows with d / n even then.  Computed from d x d products, never from n x n kernels.

    Raises:
        DataError: different n, n < 4, a value that is not finite, or a representation whose rows are all alike.
    """
    check_same_rows(x, y)
    first, second = _centred(x, "x"), _centred(y, "y")
    hsic = _unbiased_linear_hsic if unbiased else lambda a, b: (a.T @ b).pow(2).sum()
    own = []
    for name, side in (("x", first), ("y", second)):
        own.append(hsic(side, side))
        squares = (side.T @ side).pow(2).sum()
        if not own[-1] * (len(x) * (len(x) - 3) if unbiased else 1) > NOTHING * squares:
            raise DataError(
                f"CKA is undefined: the HSIC of {name} with itself is not positive (too few rows, or all rows alike)"
            )
    return float(hsic(first, second) / (own[0] * own[1]).sqrt())


def _unbiased_linear_hsic(x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """Eq. 5 of Song et al. for K = x x^T and L = y y^T with zero diagonals, without forming them."""
    n, own_x, own_y = len(x), x.pow(2).sum(1), y.pow(2).sum(1)
    rows_x, rows_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    traced = (x.T @ y).pow(2).sum() - own_x @ own_y
    return (traced + rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2)) - 2 * (rows_x @ rows_y) / (n - 2)) / (
        n * (n - 3)
    )


@dataclass(frozen=True)
class Square:
    """One number for each pair of things, (n, n) with zeros on the diagonal and length 1 as a vector: the score of two
    is their inner product."""

    values: Float[Tensor, "*batch n n"]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Square:
        """The same things in another order."""
        order, n = order.to(self.values.device), order.shape[-1]
        flat = (order[..., :, None] * n + order[..., None, :]).flatten(-2)
        return Square(self.values.flatten(-2).gather(-1, flat).unflatten(-1, (n, n)))


def _inner(x: Square, y: Square) -> Float[Tensor, "*batch"]:
    return torch.linalg.vecdot(x.values.flatten(-2), y.values.flatten(-2))


def _centred_gram(x: Array, _: int, name: str, __: int = 0) -> Square:
    """The U-centred matrix of inner products, whose inner products are n (n - 3) times the unbiased HSIC (Szekely and
    Rizzo 2014, eq. 3.2 and prop. 1)."""
    _check_pairs(x, "CKA")
    rows = _centred(x, name)
    n = rows.shape[-2]
    gram = rows @ rows.mT
    whole = torch.linalg.matrix_norm(gram)[..., None, None]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    sums = gram.sum(-1, keepdim=True)
    gram = gram - (sums + sums.mT) / (n - 2) + sums.sum(-2, keepdim=True) / ((n - 1) * (n - 2))
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    length = torch.linalg.matrix_norm(gram)[..., None, None]
    if not (length > NOTHING**0.5 * whole).all():
        raise DataError(
            f"CKA is undefined: the HSIC of {name} with itself is not positive (too few rows, or all rows alike)"
        )
    return Square(gram / length)


def _check_pairs(x: Array, label: str) -> None:
    if x.shape[-2] > MAX_PAIRED_ROWS:
        raise DataError(f"{x.shape[-2]} rows: {label} compares every pair, expected at most {MAX_PAIRED_ROWS}")


def mutual_knn(x: Array, y: Array, *, k: int = 10) -> float:
    """Mean share of a thing's k nearest neighbours (cosine) that both representations agree on (Huh et al. 2024, eq.
    11); chance is k / (n - 1).

    Raises:
        DataError: as `cknna`.
    """
    return _single("mutual_knn", x, y, k)


def _neighbors(x: Array, k: int, name: str, side: int = 0) -> Neighbors:
    return nearest_neighbors(x, k, name=name, side=side)


def _mutual_knn(x: Neighbors, y: Neighbors) -> Float[Tensor, "*batch"]:
    return _agreement(x, y)[0].double().mean((-2, -1))


def svcca(x: Array, y: Array, *, dim: int = 10) -> float:
    """Mean canonical correlation of the first `dim` principal components of both sides (Raghu et al. 2017).

    1 for representations whose leading subspaces are the same up to an invertible linear map. Chance grows with dim / n
    (about sqrt(dim / n)).

    Raises:
        DataError: different n, a value that is not finite, or fewer than `dim` independent directions on a side.
    """
    return _single("svcca", x, y, dim)


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of the first principal components' scores."""

    values: Float[Tensor, "*batch n dim"]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Basis:
        """The same things in another order."""
        return Basis(
            self.values.gather(-2, order[..., None].to(self.values.device).expand(*order.shape, self.values.shape[-1]))
        )


def _principal(x: Array, dim: int, name: str, _: int = 0) -> Basis:
    u, scale, _ = torch.linalg.svd(_centred(x, name), full_matrices=False)
    rank = int(((scale > scale[..., :1] * 1e-7) & (scale > 0)).sum(-1).min())
    if not 1 <= dim <= rank:
        raise DataError(f"dim is {dim}: expected 1 to {rank}, the independent directions of {name}")
    return Basis(u[..., :dim])


def _svcca(x: Basis, y: Basis) -> Float[Tensor, "*batch"]:
    return torch.linalg.svdvals(x.values.mT @ y.values).clamp_max(1).mean(-1)


def rsa(x: Array, y: Array) -> float:
    """Representational similarity analysis: Spearman correlation of all pairwise cosine similarities (Kriegeskorte et
    al. 2008); chance is 0.

    Raises:
        DataError: different n, more than 8192 rows (it needs every pair), a value that is not finite, a row of zeros,
            or similarities that are all equal.
    """
    return _single("rsa", x, y)


def _ranked(x: Array, _: int, name: str, __: int = 0) -> Square:
    """Ranks of all pairwise cosine similarities, of mean 0, at their pairs: Pearson's correlation of ranks is
    Spearman's."""
    _check_pairs(x, "RSA")
    rows = unit_rows(torch.as_tensor(x).double(), name)
    n = rows.shape[-2]
    upper = torch.triu_indices(n, n, 1, device=rows.device)
    # equal rows tie, whatever rounding makes of them
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


def _centred(values: Array, name: str) -> Float[Tensor, "*batch n d"]:
    rows = torch.as_tensor(values).detach().double()
    if not torch.isfinite(rows).all():
        raise DataError(
            f"{name} has a value that is not finite in row"
            f" {int((~torch.isfinite(rows)).any(-1).flatten().nonzero()[0])}"
        )
    centred = rows - rows.mean(-2, keepdim=True)
    size, whole = centred.abs().amax((-2, -1), keepdim=True), rows.abs().amax((-2, -1), keepdim=True)
    alike = size <= 1e-13 * whole  # what rounding leaves of rows that are all alike
    # no metric here depends on scale
    return torch.where(alike, 0, centred / size.clamp_min(torch.finfo(rows.dtype).tiny))


METRICS.add("cknna", Metric("CKNNA", cknna, _masked, _cknna, option="k"))
METRICS.add("cka", Metric("unbiased CKA", cka, _centred_gram, _inner, square=True))
METRICS.add("mutual_knn", Metric("mutual kNN", mutual_knn, _neighbors, _mutual_knn, option="k"))
METRICS.add("svcca", Metric("SVCCA", svcca, _principal, _svcca, option="dim"))
METRICS.add("rsa", Metric("RSA", rsa, _ranked, _inner, square=True))


def alignment_matrix(
    xs: Mapping[str, Array], ys: Mapping[str, Array], *, metric: str = "cknna", k: int = 10, dim: int = 10
) -> pd.DataFrame:
    """A metric between every representation in `xs` (rows) and every one in `ys` (columns); each is prepared once (its
    neighbours, for CKNNA).

    Args:
        k: neighbours, for the metrics that have them.
        dim: principal components, for SVCCA.

    Raises:
        UnknownNameError: a metric that does not exist.
        DataError: as the metric, naming the representation.
    """
    function = METRICS.get(metric)
    for name, x in xs.items():
        for other, y in ys.items():
            if x.shape[:-1] != y.shape[:-1]:
                raise DataError(
                    f"'{name}' has {x.shape[-2]} rows and '{other}' has {y.shape[-2]}: expected the same things in the"
                    " same order"
                )
    for name, values in (*xs.items(), *ys.items()):
        if len(values) < MIN_ROWS:
            raise DataError(f"'{name}' has {len(values)} rows: expected at least {MIN_ROWS}")
    option = {"k": k, "dim": dim}.get(function.option, 0)
    prepared = [
        {name: function.prepare(v, option, f"'{name}'", number) for name, v in side.items()}
        for number, side in enumerate((xs, ys))
    ]
    scores = [[float(function.score(x, y)) for y in prepared[1].values()] for x in prepared[0].values()]
    return pd.DataFrame(scores, index=list(xs), columns=list(ys))
