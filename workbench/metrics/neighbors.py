"""Exact k nearest neighbours by inner product, tile by tile: never an n x n matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import DataError

CHUNK_BYTES = 2**26  # of similarities held at a time, where many small representations are searched together
TILE = 2048  # rows of one block at most
BLOCK = 512  # rows of one block at least, where there are two
SAFE = (1e-12, 1e15)  # lengths whose squares float32 holds


@dataclass(frozen=True)
class Neighbors:
    """The k nearest neighbours of every row of one or many representations.

    Attributes:
        index: row numbers, ascending along the last axis, the row itself excluded.
        kernel: inner products with those neighbours.
    """

    index: Int[Tensor, "*batch n k"]
    kernel: Float[Tensor, "*batch n k"]

    @property
    def n(self) -> int:
        return self.index.shape[-2]

    @property
    def k(self) -> int:
        return self.index.shape[-1]

    def permuted(self, order: Int[Tensor, "*batch n"]) -> Neighbors:
        """The lists of the same things in another order: row i is what was row order[i]. Nothing is searched again, so it costs O(n k log k)."""
        rows = order[..., None].expand(*order.shape, self.k)
        now = torch.empty_like(order).scatter_(-1, order, torch.arange(self.n).expand(order.shape))  # where each old row stands
        index = now.gather(-1, self.index.gather(-2, rows).flatten(-2)).unflatten(-1, (self.n, self.k))
        index, slots = index.sort(dim=-1)
        return Neighbors(index, self.kernel.gather(-2, rows).gather(-1, slots))

    @cached_property
    def back(self) -> tuple[Int[Tensor, "*batch n*k"], Bool[Tensor, "*batch n*k"]]:
        """For each pair (i, j), where the pair (j, i) stands in the flattened lists, and whether it stands there at all."""
        rows = torch.arange(self.n)[:, None]
        keys = (rows * self.n + self.index).flatten(-2)  # ascending, since neighbours are
        wanted = (self.index * self.n + rows).flatten(-2)
        slot = torch.searchsorted(keys, wanted).clamp_max(self.n * self.k - 1)
        return slot, keys.gather(-1, slot) == wanted


def unit_rows(x: Tensor | np.ndarray, name: str = "x") -> Float[Tensor, "*batch n d"]:
    """`x` as a float tensor with rows of length 1; float64 stays float64, everything else becomes float32.

    Raises:
        DataError: not (n, d) or (batch, n, d), no columns, a value that is not finite, or a row of zeros, which has no direction.
    """
    values = torch.as_tensor(x).detach()
    if values.ndim < 2 or values.shape[-1] == 0:
        raise DataError(f"{name} has shape {tuple(values.shape)}: expected (n, d) with d >= 1")
    values = values if values.dtype == torch.float64 else values.to(torch.float32)
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    if ((norm > SAFE[0]) & (norm < SAFE[1])).all():  # neither a square that overflows nor one that vanishes, and no NaN
        return values / norm
    scale = values.abs().amax(dim=-1, keepdim=True)
    if not torch.isfinite(scale).all():
        row = int((~torch.isfinite(scale)).flatten().nonzero()[0])
        raise DataError(f"{name} has a value that is not finite in row {row}")
    if (scale == 0).any():
        row = int((scale == 0).flatten().nonzero()[0])
        raise DataError(f"row {row} of {name} is all zeros, so its direction is undefined")
    return torch.nn.functional.normalize(values / scale, dim=-1)  # dividing first keeps huge and tiny rows exact


def nearest_neighbors(x: Tensor | np.ndarray, k: int, *, name: str = "x") -> Neighbors:
    """Find the k nearest neighbours of every row of `x` (..., n, d) by cosine similarity; ties go to the lower row number.

    Time O(n^2 d), memory O(n k) beside one tile of similarities.

    Raises:
        DataError: as `unit_rows`, or k < 1, or n <= k.
    """
    rows = unit_rows(x, name)
    n = rows.shape[-2]
    if k < 1 or n <= k:
        raise DataError(f"k is {k} with {n} rows of {name}: expected 1 <= k < n")
    if rows.ndim == 2:
        return _tiled(rows, k)
    if n < 2 * BLOCK and n * n * rows.element_size() <= CHUNK_BYTES:  # from there on half of the products is more than what calls cost
        return _batched(rows, k)
    parts = [_tiled(part, k) for part in rows.flatten(0, -3)]
    index, kernel = (torch.stack([getattr(part, name) for part in parts]).unflatten(0, rows.shape[:-2]) for name in ("index", "kernel"))
    return Neighbors(index, kernel)


def _tiled(rows: Float[Tensor, "n d"], k: int) -> Neighbors:
    """One product of two blocks of rows serves the rows of both, so half of all products are enough."""
    n = len(rows)
    index, kernel = torch.zeros(n, k, dtype=torch.long), torch.full((n, k), -torch.inf, dtype=rows.dtype)
    tile = min(TILE, max(BLOCK, -(-n // 2)))  # two blocks at least, so that the products of one with the other serve both
    blocks = [slice(start, min(start + tile, n)) for start in range(0, n, tile)]
    for number, one in enumerate(blocks):
        for two in blocks[number:]:
            product = rows[one] @ rows[two].T
            if one is two:
                _keep_best(index[one], kernel[one], product.fill_diagonal_(-torch.inf), two.start)
            else:  # a block meets its partners in ascending order of rows
                _keep_best(index[one], kernel[one], product, two.start)
                _keep_best(index[two], kernel[two], product.T.contiguous(), one.start)
    order = index.sort(dim=-1)
    return Neighbors(order.values, kernel.gather(-1, order.indices))


def _keep_best(index: Int[Tensor, "rows k"], kernel: Float[Tensor, "rows k"], similarity: Float[Tensor, "rows columns"], first: int) -> None:
    """Merge the columns of `similarity`, numbered from `first`, into the k best so far, all of which have lower numbers."""
    found, values = _top(similarity, index.shape[-1])
    order = torch.cat([kernel, values], dim=-1).sort(dim=-1, descending=True, stable=True)
    kernel.copy_(order.values[:, : index.shape[-1]])
    index.copy_(torch.cat([index, found + first], dim=-1).gather(-1, order.indices[:, : index.shape[-1]]))


def _batched(rows: Tensor, k: int) -> Neighbors:
    step = max(1, CHUNK_BYTES // (rows.shape[-2] ** 2 * rows.element_size()))
    parts = []
    for part in rows.flatten(0, -3).split(step):
        similarity = part @ part.mT
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        parts.append(_top(similarity, k))
    batch = rows.shape[:-2]
    return Neighbors(torch.cat([i for i, _ in parts]).unflatten(0, batch), torch.cat([v for _, v in parts]).unflatten(0, batch))


def _top(similarity: Float[Tensor, "*batch rows n"], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (all where there are fewer), in ascending column order."""
    columns = similarity.shape[-1]
    best, index = similarity.topk(min(k + 1, columns), dim=-1)
    if columns > k:
        tied = best[..., k] == best[..., k - 1]
        if tied.any():  # topk leaves the order of equals open: decide these rows by a stable sort
            index[tied] = similarity[tied].sort(dim=-1, descending=True, stable=True).indices[..., : k + 1]
    index = index[..., :k].sort(dim=-1).values
    return index, similarity.gather(-1, index)
