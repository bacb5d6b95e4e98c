"""LLaVA-1.5 and models trained here: one square token grid per image, one token per patch.

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
    """Return one square token grid per image.

    If the projector receives the class token too (`vision_feature_select_strategy: full`), it comes before the grid as
    a visual token without a place in the image.

    Raises:
        ModelError: the visual tokens of an image do not form a square.
    """
    samples = []
    for number, sample in enumerate(placeholders(config, batch)):
        parts = []
        for image, index in enumerate(sample):
            if first := _class_tokens(config):
                parts.append(VisualTokens(index[:first], None, WHOLE, image))
                index = index[first:]
            side = math.isqrt(len(index))
            if side * side != len(index):
                raise ModelError(
                    f"{family_of(config).name}: an image has {len(index)} visual tokens: expected a square number"
                )
            box = _patched(config, _shown(processor.image_processor, batch.images[number][image]))
            parts.append(VisualTokens(index, (side, side), box, image, fill=_fill(processor.image_processor)))
        samples.append(parts)
    return samples


def _class_tokens(config: Any) -> int:
    """Return how many visual tokens come before those of the patches.

    There are any only with LLaVA's `cls_patch`, which transformers calls `full`.
    """
    if getattr(config, "vision_feature_select_strategy", None) != "full":
        return 0
    return FIRST_TOKENS.get(config.vision_config.model_type, 0)


def _shown(processor: Any, image: Image.Image) -> Box:
    """Return the part of the image that the vision encoder receives.

    That is all of it, its center (center crop), or more than the image (padded to a square).
    """
    width, height = image.size
    if getattr(processor, "do_pad", False):
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return -left / width, -top / height, (side - left) / width, (side - top) / height
    if not getattr(processor, "do_center_crop", False):
        return WHOLE
    size, short = processor.size, min(width, height)
    if not processor.do_resize:
        resized = (width, height)
    elif size.get("shortest_edge"):
        long = int(size["shortest_edge"] * max(width, height) / short)
        resized = (long, size["shortest_edge"]) if width >= height else (size["shortest_edge"], long)
    else:
        resized = (size["width"], size["height"])
    crop = (processor.crop_size["width"], processor.crop_size["height"])
    left, top = ((side - cropped) // 2 for side, cropped in zip(resized, crop, strict=True))
    width, height = resized
    return left / width, top / height, (left + crop[0]) / width, (top + crop[1]) / height


def _fill(processor: Any) -> tuple[int, int, int]:
    """Return the RGB color of the bars around an image that is padded to a square.

    It is the mean that normalization subtracts, as in LLaVA's own code.
    """
    if not getattr(processor, "do_pad", False):
        return (0, 0, 0)
    red, green, blue = (int(255 * channel) for channel in processor.image_mean)
    return red, green, blue


def _patched(config: Any, shown: Box) -> Box:
    """Return the part of the image that whole patches cover.

    If the patch size does not divide the image size, a few pixels at the right and at the bottom belong to no patch.
    """
    vision = config.vision_config
    share = vision.image_size // vision.patch_size * vision.patch_size / vision.image_size
    left, top, right, bottom = shown
    return left, top, left + share * (right - left), top + share * (bottom - top)


LLAVA = FAMILIES.add(
    "llava",
    Family("llava", ("LlavaForConditionalGeneration",), one_grid, shared_settings=llava_settings, shares_prefix=True),
)
