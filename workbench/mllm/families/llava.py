"""LLaVA-1.5 and models trained here: one square raster an image, one token per patch.

LlavaForConditionalGeneration
  model.vision_tower            a ViT (CLIP, SigLIP, DINOv2)
  model.multi_modal_projector   two linear layers
  model.language_model          decoder: .layers, .norm
  lm_head
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image
from transformers import PretrainedConfig

from workbench.errors import ModelError
from workbench.mllm.family import FAMILIES, WHOLE, Batch, Box, Family, Processor, VisualTokens, family_of, placeholders
from workbench.mllm.processors import FIRST_TOKENS, llava_settings


def one_grid(config: PretrainedConfig, processor: Processor, batch: Batch) -> list[list[VisualTokens]]:
    """One square raster per image; before it the class token, which has no place in the image, where the connector is
    given all that the encoder puts out."""
    found = []
    for number, sample in enumerate(placeholders(config, batch)):
        parts = []
        for image, index in enumerate(sample):
            if first := _class_tokens(config):
                parts.append(VisualTokens(index[:first], None, WHOLE, image))
                index = index[first:]
            side = math.isqrt(len(index))
            if side * side != len(index):
                raise ModelError(
                    f"{family_of(config).name}: {len(index)} visual tokens of an image are not a square raster"
                )
            box = _patched(config, _shown(processor.image_processor, batch.images[number][image]))
            parts.append(VisualTokens(index, (side, side), box, image, fill=_fill(processor.image_processor)))
        found.append(parts)
    return found


def _class_tokens(config: Any) -> int:
    """Visual tokens before those of the patches: LLaVA's `cls_patch`, which transformers calls `full`."""
    if getattr(config, "vision_feature_select_strategy", None) != "full":
        return 0
    return FIRST_TOKENS.get(config.vision_config.model_type, 0)


def _shown(processor: Any, image: Image.Image) -> Box:
    """The part of the image that becomes pixels: all of it, its centre, or more than it where it is padded to a
    square."""
    width, height = image.size
    if getattr(processor, "do_pad", False):
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return -left / width, -top / height, (side - left) / width, (side - top) / height
    if not getattr(processor, "do_center_crop", False):
        return WHOLE
    size, short = processor.size, min(width, height)
    if not processor.do_resize:
        new = (width, height)
    elif size.get("shortest_edge"):
        long = int(size["shortest_edge"] * max(width, height) / short)
        new = (long, size["shortest_edge"]) if width >= height else (size["shortest_edge"], long)
    else:
        new = (size["width"], size["height"])
    crop = (processor.crop_size["width"], processor.crop_size["height"])
    left, top = ((n - c) // 2 for n, c in zip(new, crop, strict=True))
    return left / new[0], top / new[1], (left + crop[0]) / new[0], (top + crop[1]) / new[1]


def _fill(processor: Any) -> tuple[int, int, int]:
    """The colour of the bars around an image that is padded to a square: the mean that is taken off, as LLaVA's own
    code has it."""
    if not getattr(processor, "do_pad", False):
        return (0, 0, 0)
    red, green, blue = (int(255 * channel) for channel in processor.image_mean)
    return red, green, blue


def _patched(config: Any, shown: Box) -> Box:
    """What whole patches cover of it: a few pixels at the right and below belong to none where the patch does not
    divide the image."""
    vision = config.vision_config
    share = vision.image_size // vision.patch_size * vision.patch_size / vision.image_size
    left, top, right, bottom = shown
    return left, top, left + share * (right - left), top + share * (bottom - top)


LLAVA = FAMILIES.add(
    "llava",
    Family("llava", ("LlavaForConditionalGeneration",), one_grid, shared_settings=llava_settings, shares_prefix=True),
)
