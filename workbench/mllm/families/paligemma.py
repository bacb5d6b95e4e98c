"""PaliGemma: like LLaVA, one square token grid over the whole image.

There is no chat template, and the tokens of a prompt attend to one another in both directions.

PaliGemmaForConditionalGeneration
  model.vision_tower            SigLIP
  model.multi_modal_projector   one linear layer
  model.language_model          Gemma: .layers, .norm
"""

from __future__ import annotations

from workbench.mllm.families.llava import one_grid
from workbench.mllm.family import FAMILIES, Family
from workbench.mllm.processors import paligemma_settings

# Tokens of the answer have type 1: they attend only to what comes before them.
PALIGEMMA = FAMILIES.add(
    "paligemma",
    Family(
        "paligemma", ("PaliGemmaForConditionalGeneration",), one_grid, answer_type=1, shared_settings=paligemma_settings
    ),
)
