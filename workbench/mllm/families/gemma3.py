"""Gemma 3: like LLaVA, one square grid over the whole image, but one token for each pool of patches.

Gemma3ForConditionalGeneration
  model.vision_tower            SigLIP
  model.multi_modal_projector   mean pool, `mm_soft_emb_norm`, one matrix
  model.language_model          decoder with sliding windows: .layers, .norm
"""

from __future__ import annotations

from transformers import PretrainedConfig

from workbench.errors import ModelError
from workbench.mllm.families.llava import one_grid
from workbench.mllm.family import FAMILIES, Batch, Family, Processor, VisualTokens
from workbench.mllm.processors import gemma3_settings


def visual_tokens(config: PretrainedConfig, processor: Processor, batch: Batch) -> list[list[VisualTokens]]:
    """Return one square token grid per image.

    Raises:
        ModelError: the processor adds crops of the image (do_pan_and_scan).
    """
    if processor.image_processor.do_pan_and_scan:
        raise ModelError(
            "gemma3: the processor adds crops of the image: expected do_pan_and_scan=False, so that each image has one"
            " token grid"
        )
    return one_grid(config, processor, batch)


GEMMA3 = FAMILIES.add(
    "gemma3",
    Family(
        "gemma3",
        ("Gemma3ForConditionalGeneration",),
        visual_tokens,
        projector="multi_modal_projector.mm_soft_emb_norm",
        shared_settings=gemma3_settings,
    ),
)
