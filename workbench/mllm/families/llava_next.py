"""LLaVA-NeXT: one token grid over the whole image, then a second one at high resolution, without its padding.

LlavaNextForConditionalGeneration
  model.vision_tower            a ViT (CLIP, SigLIP); sees the image and its tiles as one batch
  model.multi_modal_projector   two linear layers
  model.image_newline           one vector after every row of the high-resolution grid; not part of the image
  model.language_model          decoder: .layers, .norm
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlavaOnevisionConfig, PretrainedConfig
from transformers.image_processing_utils import select_best_resolution

from workbench.errors import ModelError
from workbench.mllm.family import FAMILIES, Batch, Family, Processor, VisualTokens, family_of
from workbench.mllm.processors import llava_settings


def visual_tokens(config: PretrainedConfig, processor: Processor, batch: Batch) -> list[list[VisualTokens]]:
    """Return the base grid and the high-resolution grid of each image.

    Samples with several images have base grids only in LLaVA-OneVision.

    Raises:
        ModelError: a sample has another number of visual tokens than its images need.
    """
    samples, first_row = [], 0  # first_row: number of the next row of the projector's input
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tile = side * side
    is_onevision = "batch_num_images" in batch.inputs
    for number, images in enumerate(batch.images):
        positions = (batch.inputs["input_ids"][number] == config.image_token_id).nonzero().flatten()
        parts, position = [], 0
        for number_in_sample, image in enumerate(images):
            # SigLIP's patches leave out a few pixels at the right and at the bottom
            edge = side * vision.patch_size / vision.image_size
            parts.append(
                VisualTokens(
                    positions[position : position + tile],
                    (side, side),
                    (0.0, 0.0, edge, edge),
                    number_in_sample,
                    first_row + torch.arange(tile),
                )
            )
            position, first_row = position + tile, first_row + tile
            if is_onevision and len(images) > 1:
                position += 1  # a newline
                continue
            full_rows, spans, starts, tiles = _high_resolution_grid(
                image.size, config.image_grid_pinpoints, vision.image_size, vision.patch_size
            )
            rows = _shrunk(full_rows, config, side)
            height, width = rows.shape
            if position + height * (width + 1) > len(positions):
                raise ModelError(
                    f"{family_of(config).name}: sample {number} has {len(positions)} visual tokens, fewer than a"
                    f" {height} x {width} grid needs"
                )
            index = positions[position : position + height * (width + 1)].view(height, width + 1)[:, :width].flatten()
            if rows.numel():  # of a very thin image the model drops everything but the newlines
                (top, bottom), (left, right) = ((float(span[0, 0]), float(span[-1, 1])) for span in spans)
                batch_rows = torch.where(rows < 0, rows, first_row + rows).flatten()
                box = (left, top, right, bottom)
                part = VisualTokens(index, (height, width), box, number_in_sample, batch_rows)
                exact = rows.shape == full_rows.shape
                parts.append(replace(part, spans=spans, tile_starts=starts) if exact else part)
            position, first_row = position + height * (width + 1), first_row + tiles * tile
        if position != len(positions):
            raise ModelError(
                f"{family_of(config).name}: sample {number} has {len(positions)} visual tokens: expected {position}"
            )
        samples.append(parts)
    return samples


Spans = tuple[Float[Tensor, "h 2"], Float[Tensor, "w 2"]]
Starts = tuple[tuple[int, ...], tuple[int, ...]]


def _high_resolution_grid(
    size: tuple[int, int], pinpoints: list[list[int]], tile: int, patch: int
) -> tuple[Int[Tensor, "h w"], Spans, Starts, int]:
    """Return what the model keeps of the high-resolution grid of one image.

    The image is resized to fit the best canvas, centered in it, and cut into tiles; features over the padding are
    dropped.

    Args:
        size: width and height of the image.
        pinpoints: the canvases to choose from, (height, width).
        tile: side of a tile, in pixels.
        patch: side of a patch, in pixels.

    Returns:
        For each token the row of the projector's input that it comes from, counted from the first tile of the image;
        the parts of the image that the grid's rows and columns cover; the grid rows and columns with which a tile
        begins; and the number of tiles.
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
    # The model computes how many tokens it drops from the image's proportions, not from the padding in pixels.
    total_h, total_w = rows.shape
    if width / height > total_w / total_h:
        dropped = (total_h - int(round(height * (total_w / width), 7))) // 2
        inside = slice(dropped, total_h - dropped)
        starts = _tile_starts(total_h, side, dropped), _tile_starts(total_w, side, 0)
        return rows[inside], (spans[0][inside], spans[1]), starts, down * across
    dropped = (total_w - int(round(width * (total_h / height), 7))) // 2
    inside = slice(dropped, total_w - dropped)
    starts = _tile_starts(total_h, side, 0), _tile_starts(total_w, side, dropped)
    return rows[:, inside], (spans[0], spans[1][inside]), starts, down * across


def _tile_starts(total: int, side: int, dropped: int) -> tuple[int, ...]:
    """Return with which of the remaining rows (or columns) each tile begins; a tile that is all padding has none.

    Args:
        total: rows of all tiles.
        side: rows of one tile.
        dropped: rows that are dropped at each end.
    """
    numbers = range(dropped, total - dropped)
    return tuple(at for at, number in enumerate(numbers) if at == 0 or number % side == 0)


def _spans(tiles: int, side: int, tile: int, patch: int, padding: int, length: int) -> Float[Tensor, "token 2"]:
    """Return where each token along one axis begins and ends, in fractions of the image.

    If the patch size does not divide the tile, the last pixels of the tile belong to no patch.

    Args:
        tiles: number of tiles along the axis.
        side: patches of a tile along the axis.
        tile, patch: their sides, in pixels.
        padding: pixels of the canvas before the image.
        length: pixels of the image in the canvas.
    """
    start = (torch.arange(tiles)[:, None] * tile + torch.arange(side) * patch).flatten() - padding
    return torch.stack([start, start + patch], dim=1).double() / length


def _shrunk(rows: Int[Tensor, "h w"], config: PretrainedConfig, side: int) -> Int[Tensor, "h2 w2"]:
    """Return the grid after LLaVA-OneVision has interpolated it, if it has too many tokens.

    An interpolated token mixes several rows of the projector's input: it gets -1.
    """
    if not isinstance(config, LlavaOnevisionConfig):
        return rows
    height, width = rows.shape
    ratio = math.sqrt(height * width / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
    return rows if ratio <= 1.1 else torch.full((int(height // ratio), int(width // ratio)), -1)


LLAVA_NEXT = FAMILIES.add(
    "llava_next",
    Family("llava_next", ("LlavaNextForConditionalGeneration",), visual_tokens, shared_settings=llava_settings),
)
