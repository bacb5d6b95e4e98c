"""From visual tokens to pixels: patch grids of one image, and how much of each patch an object covers.

A model may cut an image into several parts (tiles, a thumbnail). Each part is a `VisualTokens` with a patch grid of its
own and a box, the part of the image it covers. Coordinates are fractions of the original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image

from workbench.data.base import Object
from workbench.errors import ModelError
from workbench.mllm.family import VisualTokens


def canvas(parts: Sequence[VisualTokens]) -> VisualTokens:
    """Return the patch grid on which everything about one image is shown.

    It is the finest grid of the image, or all tiles of the finest patch size side by side. A family with one grid gets
    that grid. The result's `index` numbers its patches; it holds no positions in the sequence.

    Raises:
        ModelError: no visual tokens, or some without a patch grid.
    """
    if not parts:
        raise ModelError("the prompt has no visual tokens: expected those of one image")
    grids = [part.grid for part in parts if part.grid is not None]
    if len(grids) < len(parts):
        raise ModelError(
            "the visual tokens of this model have no rows and columns: expected a patch grid, since attention is shown"
            " at its place in the image"
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


def sum_onto_grid(
    values: Float[np.ndarray, "*map token"], parts: Sequence[VisualTokens], onto: VisualTokens
) -> Float[np.ndarray, "*map h w"]:
    """Spread each token's value evenly over its area of the image, and sum what falls into each patch of `onto`.

    The total is preserved, except for what lies outside `onto` (a sliver at the edges of some families' coarse grid).

    Args:
        values: one value for each token of all `parts`, one part after another; for example attention.
        parts: all parts of one image, each with a patch grid.
        onto: the patch grid of the result.
    """
    assert onto.grid is not None
    total = np.zeros((*values.shape[:-1], *onto.grid))
    first = 0
    for part in parts:
        assert part.grid is not None
        part_values = values[..., first : first + len(part.index)].reshape(*values.shape[:-1], *part.grid)
        first += len(part.index)
        rows = _overlaps(part.box[1], part.box[3], part.grid[0], onto.box[1], onto.box[3], onto.grid[0])
        columns = _overlaps(part.box[0], part.box[2], part.grid[1], onto.box[0], onto.box[2], onto.grid[1])
        total += rows.T @ part_values @ columns
    return total


def whole_image(parts: Sequence[VisualTokens]) -> tuple[slice, VisualTokens]:
    """Return the part that shows most of the image in one piece, the finest where several do.

    Returns:
        Its slice among the tokens of all `parts`, and the part itself.

    Raises:
        ModelError: no visual tokens with rows and columns.
    """
    candidates = []
    for number, part in enumerate(parts):
        if part.grid is not None:
            left, top, right, bottom = (min(1.0, max(0.0, edge)) for edge in part.box)
            candidates.append((round((right - left) * (bottom - top), 2), len(part.index), number))
    if not candidates:
        raise ModelError(
            "the visual tokens of this prompt have no rows and columns: expected a patch grid of one image"
        )
    number = max(candidates)[-1]
    start = sum(len(part.index) for part in parts[:number])
    return slice(start, start + len(parts[number].index)), parts[number]


def colors_to_image(rgb: Float[np.ndarray, "token 3"], grid: tuple[int, int], size: int) -> Image.Image:
    """Return an image `size` pixels wide that shows each patch in its color (0..1), with hard edges."""
    patches = Image.fromarray((rgb.reshape(*grid, 3) * 255).astype(np.uint8))
    return patches.resize((size, size * grid[0] // grid[1]), Image.Resampling.NEAREST)


def object_coverage(obj: Object, part: VisualTokens) -> Float[np.ndarray, "h w"]:
    """Return the share (0..1) of each patch's area inside the object's mask, or inside its box if it has no mask."""
    assert part.grid is not None
    left, top, right, bottom = (0.0, 0.0, 1.0, 1.0) if obj.mask is not None else obj.box
    mask = np.ones((1, 1)) if obj.mask is None else obj.mask.astype(float)
    if part.spans is not None:  # patches of unequal sizes, one at a time
        rows, columns = (
            np.concatenate([_overlaps(float(start), float(end), 1, low, high, n) for start, end in spans])
            for spans, low, high, n in zip(part.spans, (top, left), (bottom, right), mask.shape, strict=True)
        )
    else:
        rows = _overlaps(part.box[1], part.box[3], part.grid[0], top, bottom, mask.shape[0])
        columns = _overlaps(part.box[0], part.box[2], part.grid[1], left, right, mask.shape[1])
    return rows @ mask @ columns.T


def union_coverage(objects: Sequence[Object], part: VisualTokens) -> Float[np.ndarray, "h w"]:
    """Return the share (0..1) of each patch's area that at least one object of an image covers.

    The masks are used if all objects have one, else the boxes.
    """
    if len(objects) == 1:
        return object_coverage(objects[0], part)
    masks = [obj.mask for obj in objects if obj.mask is not None]
    if len(masks) == len(objects):
        return object_coverage(Object("", objects[0].box, np.logical_or.reduce(masks)), part)
    boxes = np.array([obj.box for obj in objects])
    columns, rows = (np.unique(boxes[:, [axis, axis + 2]]) for axis in (0, 1))  # edges that divide the image into tiles
    tiles = [(x[0], y[0], x[1], y[1]) for x in pairwise(columns) for y in pairwise(rows)]
    inside = [((boxes[:, :2] <= tile[:2]) & (boxes[:, 2:] >= tile[2:])).all(1).any() for tile in tiles]
    covered = [
        object_coverage(Object("", tile), part) for tile, is_inside in zip(tiles, inside, strict=True) if is_inside
    ]
    assert part.grid is not None
    return sum(covered, np.zeros(part.grid))


BACKGROUND, BETWEEN, OUTSIDE = -1, -2, -3


def object_per_token(
    objects: Sequence[Object], parts: Sequence[VisualTokens], *, share: float = 0.5
) -> Int[np.ndarray, " token"]:
    """Return the number of the object that each visual token of an image lies on, one part after another.

    Returns:
        The number of the object that covers most of the token's patch, if it covers at least `share` of it;
        BACKGROUND where no object touches the patch, BETWEEN where objects cover less than `share`, and OUTSIDE where
        the center of the patch is padding.
    """
    numbers = []
    for part in parts:
        if objects:
            coverage = np.stack([object_coverage(obj, part).ravel() for obj in objects])
        else:
            coverage = np.zeros((1, len(part.index)))
        most = coverage.max(0)
        part_numbers = np.where(most >= share, coverage.argmax(0), np.where(most > 0, BETWEEN, BACKGROUND))
        center = token_centers([part])
        numbers.append(np.where(((center < 0) | (center > 1)).any(1), OUTSIDE, part_numbers))
    return np.concatenate(numbers)


def token_centers(parts: Sequence[VisualTokens]) -> Float[np.ndarray, "token 2"]:
    """Return x and y of the center of each token's patch, in fractions of the image, one part after another.

    Raises:
        ModelError: visual tokens without a patch grid.
    """
    grids = [part.grid for part in parts if part.grid is not None]
    if len(grids) < len(parts):
        raise ModelError(
            "the visual tokens of this model have no rows and columns: expected a patch grid, so that each token has a"
            " place in the image"
        )
    boxes = np.array(
        [
            part.token_box(row, column)
            for part, (rows, columns) in zip(parts, grids, strict=True)
            for row in range(rows)
            for column in range(columns)
        ]
    )
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _overlaps(low: float, high: float, n: int, other_low: float, other_high: float, m: int) -> Float[np.ndarray, "n m"]:
    """Return which share of each of n equal intervals from `low` to `high` lies in each of m other intervals."""
    edges, others = np.linspace(low, high, n + 1), np.linspace(other_low, other_high, m + 1)
    overlap = np.minimum(edges[1:, None], others[1:]) - np.maximum(edges[:-1, None], others[:-1])
    shares = overlap / np.diff(edges)[:, None]
    return np.where(shares > 1e-9, shares, 0.0)
