"""A VFM's features of exactly the pixels that the visual tokens cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from workbench.data.images import upright_rgb
from workbench.errors import DataError
from workbench.mllm.family import VisualTokens
from workbench.vfm.base import VFM

Patches = list[list[Float[Tensor, "_token _d"]]]
"""[image][part of the image, such as a tile]"""


def patches_under(vfm: VFM, images: Sequence[Image.Image], places: Sequence[Sequence[VisualTokens]]) -> Patches:
    """Return the VFM's output for the pixels under each visual token: see `layers_under`."""
    return layers_under(vfm, (), images, places)[0]


def layers_under(
    vfm: VFM, layers: Sequence[int], images: Sequence[Image.Image], places: Sequence[Sequence[VisualTokens]]
) -> list[Patches]:
    """Return the features of each VFM layer for the pixels under each visual token, from one forward pass.

    Parts with the same patch grid go through the VFM together.

    Args:
        vfm: the vision foundation model.
        layers: block numbers of the VFM; if empty, its output is the only layer.
        images: the images.
        places: the visual tokens of each image, [image][part].

    Raises:
        DataError: visual tokens without a patch grid.
    """
    if any(part.grid is None for image_parts in places for part in image_parts):
        raise DataError("some visual tokens have no rows and columns: expected a place in the image for each")
    layers = list(dict.fromkeys(layers))
    result: list[list[list[Any]]] = [[[None] * len(image_parts) for image_parts in places] for _ in layers or (None,)]
    jobs = [
        (part.grid, row, number) for row, image_parts in enumerate(places) for number, part in enumerate(image_parts)
    ]
    for grid in dict.fromkeys(job[0] for job in jobs):
        same_grid = [(row, number) for job_grid, row, number in jobs if job_grid == grid]
        pixels = [covered_pixels(images[row], places[row][number]) for row, number in same_grid]
        by_layer = vfm.layers(pixels, layers, grid=grid) if layers else [vfm(pixels, grid=grid)]
        for layer_result, features in zip(result, by_layer, strict=True):
            for (row, number), values in zip(same_grid, features.tokens(), strict=True):
                layer_result[row][number] = values
    return result


def covered_pixels(image: Image.Image, part: VisualTokens) -> Image.Image:
    """Return the pixels that `part` covers, beyond the edge of the image too, so that MLLM and VFM see the same."""
    image = upright_rgb(image)  # as the MLLM saw it; `part` knows nothing of the image as it is stored
    width, height = image.size
    left, top, right, bottom = part.box
    edges = round(left * width), round(top * height), round(right * width), round(bottom * height)
    if part.fill == (0, 0, 0):  # PIL's crop is black beyond the image
        return image.crop(edges)
    padded = Image.new("RGB", (edges[2] - edges[0], edges[3] - edges[1]), part.fill)
    padded.paste(image, (-edges[0], -edges[1]))
    return padded
