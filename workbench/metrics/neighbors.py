"""Exact k nearest neighbors by cosine similarity, computed block by block: never an n x n matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import DataError

CHUNK_BYTES = 2**26  # memory for similarities at a time, where many small representations are searched together
MAX_BLOCK = 2048  # rows
DEVICE_MAX_BLOCK, DEVICE_BYTES = 8192, 2**31  # on a GPU, where smaller blocks would leave it waiting for the host
MIN_BLOCK = 512  # rows, where there is more than one block
SAFE = (1e-12, 1e15)  # norms whose squares float32 can represent
PARALLEL = 0.99  # above this mean cosine of all pairs of rows, all products are computed in float64
# unit rows whose root mean square distance from their mean is below this differ only by rounding; for dtypes with a
# coarser rounding it is half their epsilon
ALL_EQUAL = 1e-6
TIE_DIMS = 16  # dimensions of the random directions that break ties
TIE_SEED = 20_261_125  # of those directions; a small seed could draw the very rows of a synthetic representation


@dataclass(frozen=True)
class Neighbors:
    """The k nearest neighbors of every row of one or many representations.

    Attributes:
        index: row numbers, ascending along the last axis, the row itself excluded.
        kernel: inner products of the unit rows with those neighbors.
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
        """Return the neighbors of the same rows in another order, where row i is what was row order[i].

        Nothing is searched again, so it costs O(n k log k).
        """
        order = order.to(self.index.device)
        rows = order[..., None].expand(*order.shape, self.k)
        # the new number of each old row
        new_row = torch.empty_like(order).scatter_(
            -1, order, torch.arange(self.n, device=order.device).expand(order.shape)
        )
        index = new_row.gather(-1, self.index.gather(-2, rows).flatten(-2)).unflatten(-1, (self.n, self.k))
        index, slots = index.sort(dim=-1)
        return Neighbors(index, self.kernel.gather(-2, rows).gather(-1, slots))

    @cached_property
    def back(self) -> tuple[Int[Tensor, "*batch pair"], Bool[Tensor, "*batch pair"]]:
        """For each pair (i, j), the position of the pair (j, i) in the flattened lists, and whether it is there."""
        rows = torch.arange(self.n, device=self.index.device)[:, None]
        keys = (rows * self.n + self.index).flatten(-2)  # ascending, because the neighbors are
        wanted = (self.index * self.n + rows).flatten(-2)
        slot = torch.searchsorted(keys, wanted).clamp_max(self.n * self.k - 1)
        return slot, keys.gather(-1, slot) == wanted


def unit_rows(x: Tensor | np.ndarray, name: str = "x") -> Float[Tensor, "*batch n d"]:
    """Return `x` as a float tensor with rows of norm 1; float64 stays float64, everything else becomes float32.

    Raises:
        DataError: fewer than two dimensions, no columns, a value that is not finite, or a row of zeros, which has no
            direction.
    """
    values = torch.as_tensor(x).detach()
    if values.ndim < 2 or values.shape[-1] == 0:
        raise DataError(f"{name} has shape {tuple(values.shape)}: expected (n, d) with d >= 1")
    values = values if values.dtype == torch.float64 else values.to(torch.float32)
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    if ((norm > SAFE[0]) & (norm < SAFE[1])).all():  # no square overflows or vanishes, and no NaN
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
    """Find the k nearest neighbors of every row of `x` (..., n, d) by cosine similarity.

    The result is that of float64: all products are computed in float64 where rows are nearly parallel (mean cosine
    above 0.99), and elsewhere the products of those rows whose k-th and next similarity float32 cannot distinguish.
    Ties, such as those among equal rows, are broken as an infinitesimal random displacement of the rows would break
    them. The displacement differs between the two sides of a comparison, so that ties on both sides do not add
    agreement beyond chance.

    Time O(n^2 d), memory O(n k) plus one block of similarities.

    Args:
        x: one representation (n, d), or many of equal size.
        k: number of neighbors.
        name: what errors call the representation.
        side: 0 or 1, which representation of a comparison this is.

    Raises:
        DataError: as `unit_rows`, or k < 1, or n <= k, or rows that all point the same way up to rounding, which have
            no nearest neighbors.
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
            every = bool(chosen.all())  # then nothing is copied
            part, part_values = (flat, flat_values) if every else (flat[chosen], flat_values[chosen])
            unit = unit_rows(part_values.double(), name) if exact else part
            neighbors = _search(unit, part_values, k, side)
            index[chosen], kernel[chosen] = neighbors.index, neighbors.kernel.to(kernel.dtype)
    if not batch:
        return Neighbors(index[0], kernel[0])
    return Neighbors(index.unflatten(0, batch), kernel.unflatten(0, batch))


def _check_spread(values: Tensor, name: str) -> None:
    """Raise where the rows (n, d) of a nearly parallel representation differ by no more than rounding."""
    least = max(ALL_EQUAL, torch.finfo(values.dtype).eps / 2 if values.is_floating_point() else 0.0)
    rows = unit_rows(values.double(), name)
    spread = float((rows - rows.mean(0)).pow(2).sum(-1).mean().sqrt())
    if spread <= least:
        raise DataError(
            f"the {len(rows)} rows of {name} all point the same way up to rounding (distance {spread:.1g} from their"
            " mean, as unit vectors): expected rows that differ, since equal ones have no nearest neighbors"
        )


def _search(rows: Float[Tensor, "batch n d"], values: Float[Tensor, "batch n d"], k: int, side: int) -> Neighbors:
    """Find neighbors by the unit rows, and by the values in float64 where those leave the k-th neighbor undecided."""
    n = rows.shape[-2]
    # small ones in batches; from two blocks on, computing only half of the products is worth the separate calls
    if len(rows) > 1 and n < 2 * MIN_BLOCK and n * n * rows.element_size() <= CHUNK_BYTES:
        index, kernel = _batched(rows, k)
    else:
        index, kernel = (torch.stack(parts) for parts in zip(*(_blocked(part, k) for part in rows), strict=True))
    undecided = _undecided_rows(kernel, k, rows.shape[-1])
    index, kernel = index[..., :k].clone(), kernel[..., :k].clone()
    for number in undecided.any(-1).nonzero().flatten().tolist():
        row_numbers = undecided[number].nonzero().flatten()
        index[number, row_numbers], exact_kernel = _exact_neighbors(values[number], row_numbers, k, side)
        kernel[number, row_numbers] = exact_kernel.to(kernel.dtype)
    order = index.sort(dim=-1)
    return Neighbors(order.values, kernel.gather(-1, order.indices))


def _undecided_rows(kernel: Float[Tensor, "batch n m"], k: int, d: int) -> Bool[Tensor, "batch n"]:
    """Return the rows whose k-th and next similarity are equal up to the rounding of their dtype."""
    if kernel.shape[-1] == k:
        return torch.zeros(kernel.shape[:-1], dtype=torch.bool, device=kernel.device)
    return kernel[..., k - 1] - kernel[..., k] <= _rounding(kernel.dtype, d)


def _rounding(dtype: torch.dtype, d: int) -> float:
    """Return the difference up to which two inner products of d terms count as equal."""
    return torch.finfo(dtype).eps * max(8.0, d**0.5)


def _exact_neighbors(
    values: Float[Tensor, "n d"], row_numbers: Int[Tensor, " row"], k: int, side: int
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """Find the k nearest neighbors of some rows from float64 products, with ties broken by random displacements."""
    n, d = values.shape
    displacements, parts = None, []
    for rows in row_numbers.split(max(1, (CHUNK_BYTES if values.device.type == "cpu" else DEVICE_BYTES) // (8 * n))):
        unit = unit_rows(values[rows].double())
        blocks = values.split(_max_block(values))
        similarity = torch.cat([unit @ unit_rows(block.double()).T for block in blocks], dim=1)
        similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        kth = similarity.topk(k, dim=1).values[:, -1:]
        tied = (similarity - kth).abs() <= _rounding(torch.float64, d)
        rank = torch.where(tied, 0.0, torch.where(similarity > kth, torch.inf, -torch.inf))
        if (tied.sum(1) + (rank == torch.inf).sum(1) > k).any():
            displacements = _displacements(values, side) if displacements is None else displacements
            # among tied rows, those with the most similar displacement come first
            rank = torch.where(tied, -torch.cdist(displacements[rows], displacements), rank)
        index = rank.topk(k, dim=1).indices
        parts.append((index, similarity.gather(1, index)))
    return torch.cat([index for index, _ in parts]), torch.cat([kernel for _, kernel in parts])


def _displacements(values: Float[Tensor, "n d"], side: int) -> Float[Tensor, "n j"]:
    """Return a random displacement for every row.

    A row keeps its displacement when the rows are reordered: the draws are assigned in the order of the rows'
    projections on a random direction. Among equal rows the given order decides.
    """
    # drawn on the CPU, so that they are the same on every device
    generator = torch.Generator().manual_seed(TIE_SEED)
    direction = torch.randn(values.shape[1], generator=generator, dtype=torch.float64).to(values.device)
    projections = torch.cat([unit_rows(block.double()) @ direction for block in values.split(_max_block(values))])
    order = projections.round(decimals=12).argsort(stable=True)
    generator = torch.Generator().manual_seed(TIE_SEED + 1 + side)
    drawn = torch.randn(len(values), TIE_DIMS, generator=generator, dtype=torch.float64)
    return torch.empty_like(drawn, device=values.device).index_copy_(0, order, drawn.to(values.device))


def _max_block(rows: Tensor) -> int:
    """Return the largest number of rows of one block."""
    return MAX_BLOCK if rows.device.type == "cpu" else DEVICE_MAX_BLOCK


def _blocked(rows: Float[Tensor, "n d"], k: int) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Find the k + 1 nearest rows of each row (k where there are no more), nearest first.

    The product of two blocks of rows serves both blocks, so half of all products are enough.
    """
    n, m = len(rows), min(k + 1, len(rows) - 1)
    index = torch.zeros(n, m, dtype=torch.long, device=rows.device)
    kernel = torch.full((n, m), -torch.inf, dtype=rows.dtype, device=rows.device)
    # at least two blocks, so that their product serves both
    size = min(_max_block(rows), max(MIN_BLOCK, -(-n // 2)))
    blocks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
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
    """Merge the columns of `similarity`, numbered from `first`, into the best matches so far, in place."""
    m = index.shape[-1]
    new = similarity.topk(min(m, similarity.shape[-1]), dim=-1)
    best = torch.cat([kernel, new.values], dim=-1).topk(m, dim=-1)
    kernel.copy_(best.values)
    index.copy_(torch.cat([index, new.indices + first], dim=-1).gather(-1, best.indices))


def _batched(rows: Float[Tensor, "batch n d"], k: int) -> tuple[Int[Tensor, "batch n m"], Float[Tensor, "batch n m"]]:
    """Do the same as `_blocked` for many small representations at a time."""
    step = max(1, CHUNK_BYTES // (rows.shape[-2] ** 2 * rows.element_size()))
    parts = []
    for part in rows.split(step):
        similarity = part @ part.mT
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        parts.append(similarity.topk(min(k + 1, rows.shape[-2] - 1), dim=-1))
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
