"""LLaVA-OneVision: as LLaVA-NeXT, with SigLIP, a largest number of tokens beyond which the high-resolution raster is
shrunk, and base rasters only where a sample has several images.

LlavaOnevisionForConditionalGeneration
  model.vision_tower            SigLIP; sees the image and its tiles as one batch
  model.multi_modal_projector   two linear layers
  model.image_newline           one vector after every row
  model.language_model          decoder: .layers, .norm
"""

from __future__ import annotations

from workbench.mllm.families.llava_next import visual_tokens
from workbench.mllm.family import FAMILIES, Family
from workbench.mllm.processors import llava_settings

LLAVA_ONEVISION = FAMILIES.add(
    "llava_onevision",
    Family(
        "llava_onevision", ("LlavaOnevisionForConditionalGeneration",), visual_tokens, shared_settings=llava_settings
    ),
)
