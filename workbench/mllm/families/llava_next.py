"""LLaVA-NeXT: the whole image as one raster, then the image again at high resolution, without its padding.

LlavaNextForConditionalGeneration
  model.vision_tower            a ViT (CLIP, SigLIP); sees the image and its tiles as one batch
  model.multi_modal_projector   two linear layers
  model.image_newline           one vector, after every row of the high-resolution raster; it is no part of the image
  model.language_model          decoder: .layers, .norm
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlavaOnevisionConfig, PretrainedConfig
from transformers.image_processing_utils import select_best_resolution

from workbench.errors import ModelError
from workbench.mllm.family import FAMILIES, Batch, Family, Processor, VisualTokens, family_of
from workbench.mllm.processors import llava_settings


def visual_tokens(config: PretrainedConfig, processor: Processor, batch: Batch) -> list[list[VisualTokens]]:
    """For each image the base raster and the high-resolution raster; samples with several images of OneVision have base
    rasters only."""
    found, first = [], 0
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tile = side * side
    one_each = "batch_num_images" in batch.inputs
    for number, images in enumerate(batch.images):
        positions = (batch.inputs["input_ids"][number] == config.image_token_id).nonzero().flatten()
        parts, at = [], 0
        for image, picture in enumerate(images):
            # SigLIP's patches leave out a few pixels at the right and below
            edge = side * vision.patch_size / vision.image_size
            parts.append(
                VisualTokens(
                    positions[at : at + tile], (side, side), (0.0, 0.0, edge, edge), image, first + torch.arange(tile)
                )
            )
            at, first = at + tile, first + tile
            if one_each and len(images) > 1:
                at += 1  # a newline
                continue
            rows, spans, tiles = _fine_raster(
                picture.size, config.image_grid_pinpoints, vision.image_size, vision.patch_size
            )
            whole, rows = rows, _reduced(rows, config, side)
            height, width = rows.shape
            if at + height * (width + 1) > len(positions):
                raise ModelError(
                    f"{family_of(config).name}: {len(positions)} visual tokens in sample {number}, fewer than a"
                    f" {height} x {width} raster needs"
                )
            index = positions[at : at + height * (width + 1)].view(height, width + 1)[:, :width].flatten()
            if rows.numel():  # an image so thin that the model drops all of it has newlines only
                (top, bottom), (left, right) = ((float(span[0, 0]), float(span[-1, 1])) for span in spans)
                own = torch.where(rows < 0, rows, first + rows).flatten()
                exact = spans if rows.shape == whole.shape else None
                parts.append(VisualTokens(index, (height, width), (left, top, right, bottom), image, own, exact))
            at, first = at + height * (width + 1), first + tiles * tile
        if at != len(positions):
            raise ModelError(
                f"{family_of(config).name}: {len(positions)} visual tokens in sample {number}, expected {at}"
            )
        found.append(parts)
    return found


Spans = tuple[Float[Tensor, "h 2"], Float[Tensor, "w 2"]]


def _fine_raster(
    size: tuple[int, int], pinpoints: list[list[int]], tile: int, patch: int
) -> tuple[Int[Tensor, "h w"], Spans, int]:
    """The rows of the connector's input behind each cell of the high-resolution raster, the parts of the image that its
    rows and columns cover, and its tiles.

    The image is resized into the best canvas, padded in its middle, cut into tiles of `tile` pixels, and the features
    over the padding are dropped.
    """
    width, height = size
    canvas = select_best_resolution((height, width), pinpoints)
    side, down, across = tile // patch, canvas[0] // tile, canvas[1] // tile
    rows = (
        torch.arange(down * across * side * side)
        .view(down, across, side, side)
        .transpose(1, 2)
        .reshape(down * side, across * side)
    )
    scale_w, scale_h = canvas[1] / width, canvas[0] / height
    if scale_w < scale_h:
        new_w, new_h = canvas[1], min(math.ceil(height * scale_w), canvas[0])
    else:
        new_w, new_h = min(math.ceil(width * scale_h), canvas[1]), canvas[0]
    spans = (
        _spans(down, side, tile, patch, (canvas[0] - new_h) // 2, new_h),
        _spans(across, side, tile, patch, (canvas[1] - new_w) // 2, new_w),
    )
    # What the model drops is computed from the image's proportions, in cells, not from the padding in pixels.
    total_h, total_w = rows.shape
    if width / height > total_w / total_h:
        dropped = (total_h - int(round(height * (total_w / width), 7))) // 2
        kept = slice(dropped, total_h - dropped)
        return rows[kept], (spans[0][kept], spans[1]), down * across
    dropped = (total_w - int(round(width * (total_h / height), 7))) // 2
    kept = slice(dropped, total_w - dropped)
    return rows[:, kept], (spans[0], spans[1][kept]), down * across


def _spans(tiles: int, side: int, tile: int, patch: int, padding: int, length: int) -> Float[Tensor, "cell 2"]:
    """Where each cell along one axis begins and ends, in fractions of the image; the last pixels of a tile belong to no
    patch if it is not whole patches."""
    start = (torch.arange(tiles)[:, None] * tile + torch.arange(side) * patch).flatten() - padding
    return torch.stack([start, start + patch], dim=1).double() / length


def _reduced(rows: Int[Tensor, "h w"], config: PretrainedConfig, side: int) -> Int[Tensor, "h w"]:
    """OneVision shrinks a raster of too many cells by interpolation: then no token is one row of the connector's input
    any more (-1)."""
    if not isinstance(config, LlavaOnevisionConfig):
        return rows
    height, width = rows.shape
    ratio = math.sqrt(height * width / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
    return rows if ratio <= 1.1 else torch.full((int(height // ratio), int(width // ratio)), -1)


LLAVA_NEXT = FAMILIES.add(
    "llava_next",
    Family("llava_next", ("LlavaNextForConditionalGeneration",), visual_tokens, shared_settings=llava_settings),
)
