"""SmolVLM and Idefics3: square tiles and a thumbnail; marks in the prompt say how an image is cut.

SmolVLMForConditionalGeneration, Idefics3ForConditionalGeneration
  model.vision_model                    SigLIP
  model.connector.modality_projection   after a pixel shuffle
  model.text_model                      decoder: .layers, .norm
"""

from __future__ import annotations

import re
from functools import partial

from transformers import PretrainedConfig

from workbench.errors import ModelError
from workbench.mllm.families.tiles import Cuts, tile_length, tiled
from workbench.mllm.family import FAMILIES, Batch, Family, Processor, family_of
from workbench.mllm.processors import smolvlm_settings

THUMBNAIL = "<global-img>"


def _cuts(config: PretrainedConfig, processor: Processor, batch: Batch, sample: int) -> Cuts:
    """Read how each image is cut from the prompt, where a mark comes before each tile and before the thumbnail."""
    ids = batch.inputs["input_ids"][sample]
    starts = (ids == config.image_token_id).nonzero().flatten()[:: tile_length(processor)] - 1
    cuts, last = [], (0, 0)
    for mark in processor.tokenizer.convert_ids_to_tokens(ids[starts.clamp_min(0)].tolist()):
        tile = re.fullmatch(r"<row_(\d+)_col_(\d+)>", mark)
        if tile is not None:
            last = (int(tile[1]), int(tile[2]))
        elif mark == THUMBNAIL:
            cuts.append(last)
            last = (0, 0)
        else:
            raise ModelError(
                f"{family_of(config).name}: '{mark}' comes before the visual tokens of a tile: expected <row_R_col_C>"
                f" or {THUMBNAIL}"
            )
    return cuts


SMOLVLM = FAMILIES.add(
    "smolvlm",
    Family(
        "smolvlm",
        ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        partial(tiled, _cuts),
        projector="connector.modality_projection",
        shared_settings=smolvlm_settings,
    ),
)
