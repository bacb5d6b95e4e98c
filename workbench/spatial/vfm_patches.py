"""A VFM's features of the very pixels that visual tokens cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from workbench.errors import DataError
from workbench.mllm.family import VisualTokens
from workbench.vfm.base import VFM

Patches = list[list[Float[Tensor, "token d"]]]
"""[image][raster]"""


def patches_under(vfm: VFM, pictures: Sequence[Image.Image], places: Sequence[Sequence[VisualTokens]]) -> Patches:
    """The VFM's own output for the same pixels under each token."""
    return layers_under(vfm, (), pictures, places)[0]


def layers_under(
    vfm: VFM, layers: Sequence[int], pictures: Sequence[Image.Image], places: Sequence[Sequence[VisualTokens]]
) -> list[Patches]:
    """The same for each of `layers` (without any: its output) from one pass; rasters of one grid go through it
    together.

    Raises:
        DataError: visual tokens without a raster.
    """
    if any(raster.grid is None for sample in places for raster in sample):
        raise DataError("some visual tokens have no rows and columns: expected a place in the image for each")
    layers = list(dict.fromkeys(layers))
    found: list[list[list[Any]]] = [[[None] * len(sample) for sample in places] for _ in layers or (None,)]
    jobs = [(raster.grid, row, number) for row, sample in enumerate(places) for number, raster in enumerate(sample)]
    for grid in dict.fromkeys(job[0] for job in jobs):
        same = [(row, number) for own, row, number in jobs if own == grid]
        covered = [covered_pixels(pictures[row], places[row][number]) for row, number in same]
        for one, features in zip(
            found, vfm.layers(covered, layers, grid=grid) if layers else [vfm(covered, grid=grid)], strict=True
        ):
            for (row, number), values in zip(same, features.tokens(), strict=True):
                one[row][number] = values
    return found


def covered_pixels(image: Image.Image, raster: VisualTokens) -> Image.Image:
    """What visual tokens cover of the image and beyond it, so that both sides see the same pixels under the same
    token."""
    width, height = image.size
    left, top, right, bottom = raster.box
    edges = round(left * width), round(top * height), round(right * width), round(bottom * height)
    if raster.fill == (0, 0, 0):  # a crop is black beyond the image
        return image.crop(edges)
    shown = Image.new("RGB", (edges[2] - edges[0], edges[3] - edges[1]), raster.fill)
    shown.paste(image, (-edges[0], -edges[1]))
    return shown
