"""What tiled families share: square tiles of the stretched image, row by row, and the whole image as a thumbnail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from transformers import PretrainedConfig

from workbench.mllm.family import WHOLE, Batch, Box, Processor, VisualTokens, placeholders

Cuts = list[tuple[int, int]]  # rows and columns of tiles of each image; (0, 0) if the image is not cut
LENGTH = ("image_seq_length", "image_seq_len")  # names that processors have for the number of tokens of one tile


def tile_length(processor: Processor) -> int:
    """Return the number of visual tokens of one tile."""
    return next(getattr(processor, name) for name in LENGTH if hasattr(processor, name))


def _boxes(rows: int, columns: int) -> Iterator[Box]:
    """Yield the part of the image that each tile covers, and then that of the thumbnail."""
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
    """Return one square token grid per tile, that of the thumbnail last.

    Args:
        cut: (config, processor, batch, number of the sample) -> how its images are cut.
    """
    length = tile_length(processor)
    side = math.isqrt(length)
    cuts = [cut(config, processor, batch, sample) for sample in range(len(batch))]
    counts = [[length * (rows * columns + 1) for rows, columns in sample_cuts] for sample_cuts in cuts]
    samples = []
    for positions, sample_cuts in zip(placeholders(config, batch, counts), cuts, strict=True):
        parts = []
        for image, (index, (rows, columns)) in enumerate(zip(positions, sample_cuts, strict=True)):
            parts += [
                VisualTokens(tile, (side, side), box, image)
                for tile, box in zip(index.split(length), _boxes(rows, columns), strict=True)
            ]
        samples.append(parts)
    return samples
