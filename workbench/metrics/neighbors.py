"""Exact k nearest neighbours by cosine similarity, tile by tile: never an n x n matrix."""

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
DEVICE_TILE, DEVICE_BYTES = 8192, 2**31  # on a GPU, which less leaves waiting for the host
BLOCK = 512  # rows of one block at least, where there are two
SAFE = (1e-12, 1e15)  # lengths whose squares float32 holds
PARALLEL = 0.99  # mean cosine of all pairs of rows from which all products are float64's
# root mean square distance of unit rows from their mean below which they differ by rounding alone; half a unit of
# coarser dtypes
ALIKE = 1e-6
JITTER = 16  # dimensions of the random directions that break ties
TIES = 20_261_125  # their seed; not a small number, which would draw the very rows of a synthetic representation


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
        """The lists of the same things in another order: row i is what was row order[i]. Nothing is searched again, so
        it costs O(n k log k)."""
        order = order.to(self.index.device)
        rows = order[..., None].expand(*order.shape, self.k)
        # where each old row stands
        now = torch.empty_like(order).scatter_(-1, order, torch.arange(self.n, device=order.device).expand(order.shape))
        index = now.gather(-1, self.index.gather(-2, rows).flatten(-2)).unflatten(-1, (self.n, self.k))
        index, slots = index.sort(dim=-1)
        return Neighbors(index, self.kernel.gather(-2, rows).gather(-1, slots))

    @cached_property
    def back(self) -> tuple[Int[Tensor, "*batch n*k"], Bool[Tensor, "*batch n*k"]]:
        """For each pair (i, j), where the pair (j, i) stands in the flattened lists, and whether it stands there at
        all."""
        rows = torch.arange(self.n, device=self.index.device)[:, None]
        keys = (rows * self.n + self.index).flatten(-2)  # ascending, since neighbours are
        wanted = (self.index * self.n + rows).flatten(-2)
        slot = torch.searchsorted(keys, wanted).clamp_max(self.n * self.k - 1)
        return slot, keys.gather(-1, slot) == wanted


def unit_rows(x: Tensor | np.ndarray, name: str = "x") -> Float[Tensor, "*batch n d"]:
    """`x` as a float tensor with rows of length 1; float64 stays float64, everything else becomes float32.

    Raises:
        DataError: not (n, d) or (batch, n, d), no columns, a value that is not finite, or a row of zeros, which has no
            direction.
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


def nearest_neighbors(x: Tensor | np.ndarray, k: int, *, name: str = "x", side: int = 0) -> Neighbors:
    """Find the k nearest neighbours of every row of `x` (..., n, d) by cosine similarity.

    Which rows are neighbours is decided in float64: where rows are nearly parallel (mean cosine above .99) all products
    are, elsewhere those of the rows whose k-th and next similarity float32 cannot tell apart. Ties, such as those among
    equal rows, are broken as an endlessly small random displacement of the rows would break them, another one on each
    `side` of a comparison, so that what both sides tie is no agreement beyond chance.

    Time O(n^2 d), memory O(n k) beside one tile of similarities.

    Args:
        side: 0 or 1, which representation of a comparison this is.

    Raises:
        DataError: as `unit_rows`, or k < 1, or n <= k, or rows that all point the same way up to rounding, which have
            no neighbours.
    """
    rows = unit_rows(x, name)
    n = rows.shape[-2]
    if k < 1 or n <= k:
        raise DataError(f"k is {k} with {n} rows of {name}: expected 1 <= k < n")
    values, batch = torch.as_tensor(x).detach(), rows.shape[:-2]
    flat, flat_values = rows.reshape(-1, *rows.shape[-2:]), values.reshape(-1, *rows.shape[-2:])
    parallel = flat.mean(dim=-2, dtype=torch.float64).pow(2).sum(-1) > PARALLEL
    for number in parallel.nonzero().flatten().tolist():
        _check_spread(flat_values[number], name)
    index = torch.zeros(*flat.shape[:2], k, dtype=torch.long, device=flat.device)
    kernel = torch.zeros(*flat.shape[:2], k, dtype=torch.float64 if parallel.any() else rows.dtype, device=flat.device)
    for chosen, exact in ((~parallel, False), (parallel, True)):
        if chosen.any():
            part = flat if chosen.all() else flat[chosen]
            found = _search(
                unit_rows(flat_values[chosen].double(), name) if exact else part,
                flat_values if chosen.all() else flat_values[chosen],
                k,
                side,
            )
            index[chosen], kernel[chosen] = found.index, found.kernel.to(kernel.dtype)
    return Neighbors(
        index.unflatten(0, batch) if batch else index[0], kernel.unflatten(0, batch) if batch else kernel[0]
    )


def _check_spread(values: Tensor, name: str) -> None:
    """Raise where the rows (n, d) of a nearly parallel representation differ by no more than rounding."""
    least = max(ALIKE, torch.finfo(values.dtype).eps / 2 if values.is_floating_point() else 0.0)
    rows = unit_rows(values.double(), name)
    spread = float((rows - rows.mean(0)).pow(2).sum(-1).mean().sqrt())
    if spread <= least:
        raise DataError(
            f"the {len(rows)} rows of {name} all point the same way up to rounding (distance {spread:.1g} from their"
            " mean, as unit vectors): expected rows that differ, since equal ones have no nearest neighbours"
        )


def _search(rows: Float[Tensor, "batch n d"], values: Float[Tensor, "batch n d"], k: int, side: int) -> Neighbors:
    """The neighbours by unit rows, and by the values themselves where those leave the k-th neighbour open."""
    n = rows.shape[-2]
    # from there on half of the products is more than what calls cost
    if len(rows) > 1 and n < 2 * BLOCK and n * n * rows.element_size() <= CHUNK_BYTES:
        index, kernel = _batched(rows, k)
    else:
        index, kernel = (torch.stack(parts) for parts in zip(*(_tiled(part, k) for part in rows), strict=True))
    tied = _open_rows(kernel, k, rows.shape[-1])
    index, kernel = index[..., :k].clone(), kernel[..., :k].clone()
    for number in tied.any(-1).nonzero().flatten().tolist():
        open_rows = tied[number].nonzero().flatten()
        index[number, open_rows], better = _decided(values[number], open_rows, k, side)
        kernel[number, open_rows] = better.to(kernel.dtype)
    order = index.sort(dim=-1)
    return Neighbors(order.values, kernel.gather(-1, order.indices))


def _open_rows(kernel: Float[Tensor, "batch n m"], k: int, d: int) -> Bool[Tensor, "batch n"]:
    """Rows whose k-th similarity is the next one up to the rounding of their dtype."""
    if kernel.shape[-1] == k:
        return torch.zeros(kernel.shape[:-1], dtype=torch.bool, device=kernel.device)
    return kernel[..., k - 1] - kernel[..., k] <= _rounding(kernel.dtype, d)


def _rounding(dtype: torch.dtype, d: int) -> float:
    return torch.finfo(dtype).eps * max(8.0, d**0.5)


def _decided(
    values: Float[Tensor, "n d"], open_rows: Int[Tensor, " row"], k: int, side: int
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """The k nearest neighbours of some rows from float64 products, ties broken by random directions of the rows."""
    n, d = values.shape
    away, parts = None, []
    for rows in open_rows.split(max(1, (CHUNK_BYTES if values.device.type == "cpu" else DEVICE_BYTES) // (8 * n))):
        mine = unit_rows(values[rows].double())
        similarity = torch.cat([mine @ unit_rows(block.double()).T for block in values.split(_tile(values))], dim=1)
        similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        last = similarity.topk(k, dim=1).values[:, -1:]
        near = (similarity - last).abs() <= _rounding(torch.float64, d)
        rank = torch.where(near, 0.0, torch.where(similarity > last, torch.inf, -torch.inf))
        if (near.sum(1) + (rank == torch.inf).sum(1) > k).any():
            away = _displacements(values, side) if away is None else away
            # of tied rows those that are displaced alike come first
            rank = torch.where(near, -torch.cdist(away[rows], away), rank)
        index = rank.topk(k, dim=1).indices
        parts.append((index, similarity.gather(1, index)))
    return torch.cat([index for index, _ in parts]), torch.cat([kernel for _, kernel in parts])


def _displacements(values: Float[Tensor, "n d"], side: int) -> Float[Tensor, "n j"]:
    """A random direction for every row, which follows it when rows are reordered; among equal rows the order
    decides."""
    # the same on every device
    along = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(TIES), dtype=torch.float64).to(
        values.device
    )
    where = torch.cat([unit_rows(block.double()) @ along for block in values.split(_tile(values))])
    order = where.round(decimals=12).argsort(stable=True)
    drawn = torch.randn(
        len(values), JITTER, generator=torch.Generator().manual_seed(TIES + 1 + side), dtype=torch.float64
    )
    return torch.empty_like(drawn, device=values.device).index_copy_(0, order, drawn.to(values.device))


def _tile(rows: Tensor) -> int:
    """Rows of one block at most."""
    return TILE if rows.device.type == "cpu" else DEVICE_TILE


def _tiled(rows: Float[Tensor, "n d"], k: int) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
    """The k + 1 nearest (k where there are no more), nearest first. One product of two blocks of rows serves both, so
    half of all products are enough."""
    n, m = len(rows), min(k + 1, len(rows) - 1)
    index = torch.zeros(n, m, dtype=torch.long, device=rows.device)
    kernel = torch.full((n, m), -torch.inf, dtype=rows.dtype, device=rows.device)
    # two blocks at least, so that the products of one with the other serve both
    tile = min(_tile(rows), max(BLOCK, -(-n // 2)))
    blocks = [slice(start, min(start + tile, n)) for start in range(0, n, tile)]
    for number, one in enumerate(blocks):
        for two in blocks[number:]:
            product = rows[one] @ rows[two].T
            if one is two:
                _keep_best(index[one], kernel[one], product.fill_diagonal_(-torch.inf), two.start)
            else:
                _keep_best(index[one], kernel[one], product, two.start)
                _keep_best(index[two], kernel[two], product.T.contiguous(), one.start)
    return index, kernel


def _keep_best(
    index: Int[Tensor, "rows m"], kernel: Float[Tensor, "rows m"], similarity: Float[Tensor, "rows columns"], first: int
) -> None:
    """Merge the columns of `similarity`, numbered from `first`, into the best so far."""
    m = index.shape[-1]
    found = similarity.topk(min(m, similarity.shape[-1]), dim=-1)
    best = torch.cat([kernel, found.values], dim=-1).topk(m, dim=-1)
    kernel.copy_(best.values)
    index.copy_(torch.cat([index, found.indices + first], dim=-1).gather(-1, best.indices))


def _batched(rows: Float[Tensor, "batch n d"], k: int) -> tuple[Int[Tensor, "batch n m"], Float[Tensor, "batch n m"]]:
    """As `_tiled`, many small representations at a time."""
    step = max(1, CHUNK_BYTES // (rows.shape[-2] ** 2 * rows.element_size()))
    parts = []
    for part in rows.split(step):
        similarity = part @ part.mT
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        parts.append(similarity.topk(min(k + 1, rows.shape[-2] - 1), dim=-1))
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
