"""LLaVA-1.5 and models trained here: one square image, one token per patch, in raster order.

LlavaForConditionalGeneration
  model.vision_tower            a ViT (CLIP, SigLIP, DINOv2)
  model.multi_modal_projector   two linear layers
  model.language_model          decoder: .layers, .norm
  lm_head
"""

from __future__ import annotations

import math

from transformers import BatchFeature, PretrainedConfig

from workbench.errors import ModelError
from workbench.mllm.base import FAMILIES, Family, VisualTokens


def visual_tokens(config: PretrainedConfig, batch: BatchFeature) -> list[list[VisualTokens]]:
    """One square raster per image, which covers all that the processor was shown."""
    found = []
    for ids in batch["input_ids"]:
        index = (ids == config.image_token_id).nonzero().flatten()
        side = math.isqrt(len(index))
        if side * side != len(index):
            raise ModelError(f"llava: {len(index)} visual tokens are not a square grid; the text may contain the image placeholder")
        found.append([VisualTokens(index, (side, side), (0.0, 0.0, 1.0, 1.0))] if len(index) else [])
    return found


LLAVA = FAMILIES.add("llava", Family("llava", ("LlavaForConditionalGeneration",), visual_tokens))
