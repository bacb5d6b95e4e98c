"""From visual tokens to pixels: a VFM's features of the same pixels, the rasters of one image laid on one, and how much of each cell an object covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from workbench.data.base import Object
from workbench.errors import DataError, ModelError
from workbench.mllm.base import Box, VisualTokens
from workbench.vfm.base import VFM


def canvas(parts: Sequence[VisualTokens]) -> VisualTokens:
    """The raster on which everything about one image is shown: its finest one, or all tiles of the finest size side by side.

    A family with one raster gets that raster itself. `index` of the result counts its cells and holds no positions.

    Raises:
        ModelError: no visual tokens, or some that have no rows and columns.
    """
    if not parts:
        raise ModelError("the prompt has no visual tokens: expected those of one image")
    if any(part.grid is None for part in parts):
        raise ModelError("the visual tokens of this model have no rows and columns: expected a raster, since attention is shown at its place in the image")
    sizes = np.array([[right - left, bottom - top] for left, top, right, bottom in (part.cell(0, 0) for part in parts)])
    smallest = sizes[np.argmin(sizes.prod(axis=1).round(9))]
    boxes = np.array([part.box for part, size in zip(parts, sizes, strict=True) if np.allclose(size, smallest, rtol=0.01)])
    (left, top), (right, bottom) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    grid = (round((bottom - top) / smallest[1]), round((right - left) / smallest[0]))
    return VisualTokens(torch.arange(grid[0] * grid[1]), grid, (float(left), float(top), float(right), float(bottom)))


def lay(values: Float[np.ndarray, "*map token"], parts: Sequence[VisualTokens], onto: VisualTokens) -> Float[np.ndarray, "*map h w"]:
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


def covered(thing: Object, raster: VisualTokens) -> Float[np.ndarray, "h w"]:
    """The share of each cell's area that lies in the object's mask, or in its box where no mask is known: 0..1."""
    assert raster.grid is not None
    left, top, right, bottom = (0.0, 0.0, 1.0, 1.0) if thing.mask is not None else thing.box
    mask = np.ones((1, 1)) if thing.mask is None else thing.mask.astype(float)
    rows = _shares(raster.box[1], raster.box[3], raster.grid[0], top, bottom, mask.shape[0])
    columns = _shares(raster.box[0], raster.box[2], raster.grid[1], left, right, mask.shape[1])
    return rows @ mask @ columns.T


def _shares(low: float, high: float, n: int, other_low: float, other_high: float, m: int) -> Float[np.ndarray, "n m"]:
    """Of n equal intervals between `low` and `high`, the share of each one's length inside each of m others."""
    edges, others = np.linspace(low, high, n + 1), np.linspace(other_low, other_high, m + 1)
    overlap = np.minimum(edges[1:, None], others[1:]) - np.maximum(edges[:-1, None], others[:-1])
    shares = overlap / np.diff(edges)[:, None]
    return np.where(shares > 1e-9, shares, 0.0)


def patch_features(vfm: VFM, pictures: Sequence[Image.Image], places: Sequence[Sequence[VisualTokens]]) -> list[list[Float[torch.Tensor, "token d"]]]:
    """The VFM's features of the same pixels under each visual token, [sample][raster]; rasters of one grid go through it together.

    Args:
        pictures: the image of each sample.
        places: `mllm.visual_tokens(batch)`.

    Raises:
        DataError: visual tokens that have no rows and columns.
    """
    if any(raster.grid is None for sample in places for raster in sample):
        raise DataError("this model has visual tokens without a raster: expected a place in the image for each")
    found: list[list[Any]] = [[None] * len(sample) for sample in places]
    jobs = [(raster.grid, row, number) for row, sample in enumerate(places) for number, raster in enumerate(sample)]
    for grid in dict.fromkeys(job[0] for job in jobs):
        same = [(row, number) for own, row, number in jobs if own == grid]
        features = vfm([_covered(pictures[row], places[row][number].box) for row, number in same], grid=grid).tokens()
        for (row, number), values in zip(same, features, strict=True):
            found[row][number] = values
    return found


def _covered(image: Image.Image, box: Box) -> Image.Image:
    """The part of the image that the visual tokens cover, so that both sides see the same pixels under the same token; black where it ends."""
    width, height = image.size
    return image.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))
