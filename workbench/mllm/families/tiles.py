"""What tiled families share: the image stretched and cut into square tiles, row by row, with the whole image as a
thumbnail after them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from transformers import PretrainedConfig

from workbench.mllm.family import WHOLE, Batch, Box, Processor, VisualTokens, placeholders

Cuts = list[tuple[int, int]]  # rows and columns of tiles of each image; 0 x 0 where it is not cut
LENGTH = ("image_seq_length", "image_seq_len")  # what the processors call the number of tokens of one tile


def tile_length(processor: Processor) -> int:
    """Visual tokens of one tile."""
    return next(getattr(processor, name) for name in LENGTH if hasattr(processor, name))


def _boxes(rows: int, columns: int) -> Iterator[Box]:
    """Each tile's part of the image, then the thumbnail's."""
    for row in range(rows):
        for column in range(columns):
            yield column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
    yield WHOLE


def tiled(
    cut: Callable[[PretrainedConfig, Processor, Batch, int], Cuts],
    config: PretrainedConfig,
    processor: Processor,
    batch: Batch,
) -> list[list[VisualTokens]]:
    """One square raster per tile, the thumbnail's last."""
    length = tile_length(processor)
    side = math.isqrt(length)
    cuts = [cut(config, processor, batch, sample) for sample in range(len(batch))]
    counts = [[length * (rows * columns + 1) for rows, columns in own] for own in cuts]
    found = []
    for sample, own in zip(placeholders(config, batch, counts), cuts, strict=True):
        parts = []
        for image, (index, (rows, columns)) in enumerate(zip(sample, own, strict=True)):
            parts += [
                VisualTokens(tile, (side, side), box, image)
                for tile, box in zip(index.split(length), _boxes(rows, columns), strict=True)
            ]
        found.append(parts)
    return found
