"""From visual tokens to pixels: the rasters of one image laid on one, cells as pictures, and how much of each cell an
object covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image

from workbench.data.base import Object
from workbench.errors import ModelError
from workbench.mllm.family import VisualTokens


def canvas(parts: Sequence[VisualTokens]) -> VisualTokens:
    """The raster on which everything about one image is shown: its finest one, or all tiles of the finest size side by
    side.

    A family with one raster gets that raster itself. `index` of the result counts its cells and holds no positions.

    Raises:
        ModelError: no visual tokens, or some that have no rows and columns.
    """
    if not parts:
        raise ModelError("the prompt has no visual tokens: expected those of one image")
    grids = [part.grid for part in parts if part.grid is not None]
    if len(grids) < len(parts):
        raise ModelError(
            "the visual tokens of this model have no rows and columns: expected a raster, since attention is shown at"
            " its place in the image"
        )
    sizes = np.array(
        [[right - left, bottom - top] for left, top, right, bottom in (part.token_box(0, 0) for part in parts)]
    )
    smallest = sizes[np.argmin(sizes.prod(axis=1).round(9))]
    boxes = np.array(
        [part.box for part, size in zip(parts, sizes, strict=True) if np.allclose(size, smallest, rtol=0.01)]
    )
    (left, top), (right, bottom) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    grid = (round((bottom - top) / smallest[1]), round((right - left) / smallest[0]))
    return VisualTokens(torch.arange(grid[0] * grid[1]), grid, (float(left), float(top), float(right), float(bottom)))


def lay(
    values: Float[np.ndarray, "*map token"], parts: Sequence[VisualTokens], onto: VisualTokens
) -> Float[np.ndarray, "*map h w"]:
    """Spread what each token has over its own part of the image, and add up what falls into each cell of `onto`.

    Args:
        values: for the tokens of all `parts`, one part after another, such as attention.

    Sums are kept, but for what lies outside `onto` (a sliver at the edges of some families' coarse raster).
    """
    assert onto.grid is not None
    total = np.zeros((*values.shape[:-1], *onto.grid))
    first = 0
    for part in parts:
        assert part.grid is not None
        own = values[..., first : first + len(part.index)].reshape(*values.shape[:-1], *part.grid)
        first += len(part.index)
        rows = _shares(part.box[1], part.box[3], part.grid[0], onto.box[1], onto.box[3], onto.grid[0])
        columns = _shares(part.box[0], part.box[2], part.grid[1], onto.box[0], onto.box[2], onto.grid[1])
        total += rows.T @ own @ columns
    return total


def whole_image(parts: Sequence[VisualTokens]) -> tuple[slice, VisualTokens]:
    """The raster that shows most of the image in one piece, the finest of several: its place among the tokens of all
    `parts`, and the raster itself.

    Raises:
        ModelError: no visual tokens with rows and columns.
    """
    shown = []
    for number, part in enumerate(parts):
        if part.grid is not None:
            left, top, right, bottom = (min(1.0, max(0.0, edge)) for edge in part.box)
            shown.append((round((right - left) * (bottom - top), 2), len(part.index), number))
    if not shown:
        raise ModelError("the visual tokens of this prompt have no rows and columns: expected a raster of one image")
    number = max(shown)[-1]
    start = sum(len(part.index) for part in parts[:number])
    return slice(start, start + len(parts[number].index)), parts[number]


def picture(rgb: Float[np.ndarray, "token 3"], grid: tuple[int, int], size: int) -> Image.Image:
    """Colours of cells, floats in 0..1, as a picture `size` pixels wide with hard cell edges."""
    cells = Image.fromarray((rgb.reshape(*grid, 3) * 255).astype(np.uint8))
    return cells.resize((size, size * grid[0] // grid[1]), Image.Resampling.NEAREST)


def covered(thing: Object, raster: VisualTokens) -> Float[np.ndarray, "h w"]:
    """The share of each cell's area that lies in the object's mask, or in its box where no mask is known: 0..1."""
    assert raster.grid is not None
    left, top, right, bottom = (0.0, 0.0, 1.0, 1.0) if thing.mask is not None else thing.box
    mask = np.ones((1, 1)) if thing.mask is None else thing.mask.astype(float)
    if raster.spans is not None:  # cells that do not divide the box evenly, one at a time
        rows, columns = (
            np.concatenate([_shares(float(a), float(b), 1, low, high, n) for a, b in own])
            for own, low, high, n in zip(raster.spans, (top, left), (bottom, right), mask.shape, strict=True)
        )
    else:
        rows = _shares(raster.box[1], raster.box[3], raster.grid[0], top, bottom, mask.shape[0])
        columns = _shares(raster.box[0], raster.box[2], raster.grid[1], left, right, mask.shape[1])
    return rows @ mask @ columns.T


BACKGROUND, BETWEEN, OUTSIDE = -1, -2, -3


def owners(things: Sequence[Object], parts: Sequence[VisualTokens], *, share: float = 0.5) -> Int[np.ndarray, " token"]:
    """Which object each visual token of an image lies on, all parts one after another.

    Returns:
        The number of the object that covers at least `share` of the token's cell (the one that covers most of it),
        BACKGROUND where no object touches the cell, BETWEEN where objects cover less of it than that, and OUTSIDE where
        the middle of the cell is padding.
    """
    found = []
    for part in parts:
        cover = (
            np.stack([covered(thing, part).ravel() for thing in things]) if things else np.zeros((1, len(part.index)))
        )
        own = np.where(cover.max(0) >= share, cover.argmax(0), np.where(cover.max(0) > 0, BETWEEN, BACKGROUND))
        middle = centres([part])
        found.append(np.where(((middle < 0) | (middle > 1)).any(1), OUTSIDE, own))
    return np.concatenate(found)


def centres(parts: Sequence[VisualTokens]) -> Float[np.ndarray, "token 2"]:
    """x and y of the middle of each visual token's cell in fractions of the image, all parts one after another.

    Raises:
        ModelError: visual tokens that have no rows and columns.
    """
    grids = [part.grid for part in parts if part.grid is not None]
    if len(grids) < len(parts):
        raise ModelError(
            "the visual tokens of this model have no rows and columns: expected a raster, so that each token has a"
            " place in the image"
        )
    cells = np.array(
        [
            part.token_box(row, column)
            for part, (rows, columns) in zip(parts, grids, strict=True)
            for row in range(rows)
            for column in range(columns)
        ]
    )
    return (cells[:, :2] + cells[:, 2:]) / 2


def _shares(low: float, high: float, n: int, other_low: float, other_high: float, m: int) -> Float[np.ndarray, "n m"]:
    """Of n equal intervals between `low` and `high`, the share of each one's length inside each of m others."""
    edges, others = np.linspace(low, high, n + 1), np.linspace(other_low, other_high, m + 1)
    overlap = np.minimum(edges[1:, None], others[1:]) - np.maximum(edges[:-1, None], others[:-1])
    shares = overlap / np.diff(edges)[:, None]
    return np.where(shares > 1e-9, shares, 0.0)
