"""Read the outputs of single attention heads at the visual tokens, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.attention_heads import Head, head_count, head_outputs, output_projection
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch, VisualTokens


def read_heads(
    mllm: MLLM, batch: Batch, places: Sequence[Sequence[VisualTokens]], heads: Sequence[Head]
) -> list[list[list[Float[Tensor, "_token _d"]]]]:
    """Return the output of each attention head before o_proj, [head][sample][image or tile] (token, head width).

    The values are in float32 on the CPU.

    Args:
        mllm: the model.
        batch: the encoded prompts.
        places: the visual tokens, as `mllm.visual_tokens(batch)` returns them.
        heads: pairs of layer and head.

    Raises:
        ModelError: a layer's attention has no o_proj.
    """
    text, blocks = mllm.config.get_text_config(), mllm.decoder.layers
    inputs: dict[int, list[list[Tensor]]] = {}  # of o_proj at the visual tokens, by layer

    def keep(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = [
            [states[part.index.to(states.device)].float().cpu() for part in parts]
            for states, parts in zip(args[0], places, strict=True)
        ]

    handles = [
        output_projection(blocks[layer - 1], layer).register_forward_pre_hook(partial(keep, layer))
        for layer in dict.fromkeys(layer for layer, _ in heads)
    ]
    try:
        with mllm.lock, torch.inference_mode():
            mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    counts = {layer: head_count(text, blocks[layer - 1], layer) for layer in inputs}
    return [
        [[head_outputs(values, counts[layer], head) for values in parts] for parts in inputs[layer]]
        for layer, head in heads
    ]
