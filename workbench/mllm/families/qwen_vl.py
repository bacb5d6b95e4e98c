"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one token grid of any shape over the whole image, a token per 2 x 2 patches.

Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
  model.visual                  its own ViT; `.merger` joins 2 x 2 patches to one token
  model.language_model          decoder: .layers, .norm; Qwen3-VL adds encoder features to the outputs of its first
                                blocks
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.vision_utils import get_vision_window_index

from workbench.mllm.family import FAMILIES, WHOLE, Batch, Family, Processor, VisualTokens, placeholders
from workbench.mllm.processors import merged_settings


def visual_tokens(config: PretrainedConfig, processor: Processor, batch: Batch) -> list[list[VisualTokens]]:
    """Return one token grid per image; the processor stretches the image to whole patches."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patches = batch.inputs.get("image_grid_thw", torch.empty(0, 3)).cpu()
    grids = [(int(h) // merge, int(w) // merge) for _, h, w in patches]
    # Qwen2.5-VL's vision encoder works window by window, and puts the merged tokens back in order afterwards
    if getattr(vision, "window_size", None) and len(patches):
        order = get_vision_window_index(
            patches, spatial_merge_size=merge, window_size=vision.window_size, patch_size=vision.patch_size
        )[0].argsort()
    else:
        order = torch.arange(sum(h * w for h, w in grids))
    per_sample, start = [], 0
    for images in batch.images:
        per_sample.append(grids[start : start + len(images)])
        start += len(images)
    samples, row = [], 0
    counts = [[h * w for h, w in sample_grids] for sample_grids in per_sample]
    for positions, sample_grids in zip(placeholders(config, batch, counts), per_sample, strict=True):
        parts = []
        for image, (index, grid) in enumerate(zip(positions, sample_grids, strict=True)):
            parts.append(VisualTokens(index, grid, WHOLE, image, order[row : row + len(index)]))
            row += len(index)
        samples.append(parts)
    return samples


def _merged(config: PretrainedConfig) -> int:
    return config.vision_config.spatial_merge_size**2


def _deepstack(config: PretrainedConfig) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


def _family(name: str, architecture: str, **more: Any) -> Family:
    return FAMILIES.add(
        name,
        Family(name, (architecture,), visual_tokens, "visual.merger", _merged, shared_settings=merged_settings, **more),
    )


QWEN2_VL = _family("qwen2_vl", "Qwen2VLForConditionalGeneration")
QWEN2_5_VL = _family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
QWEN3_VL = _family("qwen3_vl", "Qwen3VLForConditionalGeneration", injected_blocks=_deepstack)
