"""InternVL, SmolVLM and Idefics3: the image stretched and cut into square tiles, row by row, with the whole image as a thumbnail after them.

InternVLForConditionalGeneration                              SmolVLMForConditionalGeneration, Idefics3ForConditionalGeneration
  model.vision_tower                                            model.vision_model
  model.multi_modal_projector  (after a pixel shuffle)          model.connector.modality_projection  (after a pixel shuffle)
  model.language_model         decoder: .layers, .norm          model.text_model                     decoder: .layers, .norm
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from workbench.errors import ModelError
from workbench.mllm.base import FAMILIES, MLLM, WHOLE, Batch, Box, Family, VisualTokens, placeholders

Cuts = list[tuple[int, int]]  # rows and columns of tiles of each image; 0 x 0 where it is not cut
THUMBNAIL = "<global-img>"
LENGTH = ("image_seq_length", "image_seq_len")  # what the processors call the number of tokens of one tile


def _internvl(mllm: MLLM, batch: Batch, sample: int) -> Cuts:
    """Computed from each image's size, as the processor does."""
    images, wanted = mllm.processor.image_processor, mllm.processor.images_kwargs
    if not wanted.get("crop_to_patches", images.crop_to_patches) or images.max_patches < 2:
        return [(0, 0)] * len(batch.images[sample])
    size = (images.size["height"], images.size["width"])
    cuts = [get_optimal_tiled_canvas((i.height, i.width), size, images.min_patches, images.max_patches)[::-1] for i in batch.images[sample]]
    return [(rows, columns) if rows * columns > 1 else (0, 0) for rows, columns in cuts]


def _idefics3(mllm: MLLM, batch: Batch, sample: int) -> Cuts:
    """Read from the prompt itself, where each tile comes after its mark, and the whole image after the tiles."""
    ids = batch.inputs["input_ids"][sample]
    starts = (ids == mllm.config.image_token_id).nonzero().flatten()[:: _length(mllm)] - 1
    cuts, last = [], (0, 0)
    for mark in mllm.processor.tokenizer.convert_ids_to_tokens(ids[starts.clamp_min(0)].tolist()):
        tile = re.fullmatch(r"<row_(\d+)_col_(\d+)>", mark)
        if tile is not None:
            last = (int(tile[1]), int(tile[2]))
        elif mark == THUMBNAIL:
            cuts.append(last)
            last = (0, 0)
        else:
            raise ModelError(f"{mllm.family.name}: '{mark}' before the visual tokens of a tile, expected <row_R_col_C> or {THUMBNAIL}")
    return cuts


def _length(mllm: MLLM) -> int:
    return next(getattr(mllm.processor, name) for name in LENGTH if hasattr(mllm.processor, name))


def _boxes(rows: int, columns: int) -> Iterator[Box]:
    """Each tile's part of the image, then the thumbnail's."""
    for row in range(rows):
        for column in range(columns):
            yield column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
    yield WHOLE


def _visual_tokens(cut: Callable[[MLLM, Batch, int], Cuts], mllm: MLLM, batch: Batch) -> list[list[VisualTokens]]:
    """One square raster per tile, the thumbnail's last."""
    length = _length(mllm)
    side = math.isqrt(length)
    cuts = [cut(mllm, batch, sample) for sample in range(len(batch))]
    counts = [[length * (rows * columns + 1) for rows, columns in own] for own in cuts]
    found = []
    for sample, own in zip(placeholders(mllm, batch, counts), cuts, strict=True):
        parts = []
        for image, (index, (rows, columns)) in enumerate(zip(sample, own, strict=True)):
            parts += [VisualTokens(tile, (side, side), box, image) for tile, box in zip(index.split(length), _boxes(rows, columns), strict=True)]
        found.append(parts)
    return found


INTERNVL = FAMILIES.add("internvl", Family("internvl", ("InternVLForConditionalGeneration",), lambda m, b: _visual_tokens(_internvl, m, b)))
SMOLVLM = FAMILIES.add(
    "smolvlm",
    Family(
        "smolvlm",
        ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        lambda m, b: _visual_tokens(_idefics3, m, b),
        connector="connector.modality_projection",
    ),
)
