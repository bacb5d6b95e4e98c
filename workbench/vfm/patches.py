"""A VFM's features of the very pixels that visual tokens cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from workbench.mllm.base import Box, VisualTokens
from workbench.vfm.base import VFM


def patches_under(vfm: VFM, pictures: Sequence[Image.Image], places: Sequence[Sequence[VisualTokens]]) -> list[list[Float[Tensor, "token d"]]]:
    """The VFM's features of the same pixels under each token, [image][raster]; rasters of one grid go through it together."""
    found: list[list[Any]] = [[None] * len(sample) for sample in places]
    jobs = [(raster.grid, row, number) for row, sample in enumerate(places) for number, raster in enumerate(sample)]
    for grid in dict.fromkeys(job[0] for job in jobs):
        same = [(row, number) for own, row, number in jobs if own == grid]
        features = vfm([covered_pixels(pictures[row], places[row][number].box) for row, number in same], grid=grid).tokens()
        for (row, number), values in zip(same, features, strict=True):
            found[row][number] = values
    return found


def covered_pixels(image: Image.Image, box: Box) -> Image.Image:
    """The part of the image that the visual tokens cover, so that both sides see the same pixels under the same token; black where it ends."""
    width, height = image.size
    return image.crop((round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height)))
