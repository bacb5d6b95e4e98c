"""LLaVA-OneVision: like LLaVA-NeXT, with SigLIP.

A high-resolution grid with too many tokens is interpolated to fewer, and samples with several images have base grids
only.

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
