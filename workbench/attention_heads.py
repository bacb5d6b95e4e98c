"""The outputs of single attention heads: what each head sends to `o_proj`, which mixes them.

The input of o_proj is the concatenation of the heads' outputs, so head h of H has the h-th of H equal parts. There is
one output for each query head, also where several query heads share their keys and values (GQA, MQA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from workbench.errors import ModelError

Head = tuple[int, int]
"""A layer from 1, and an attention head of it from 0."""


def output_projection(block: Any, layer: int) -> Any:
    """Return o_proj, the linear layer that mixes the outputs of a block's attention heads.

    Args:
        block: of the language model.
        layer: its number, for the message.

    Raises:
        ModelError: the block has no `self_attn.o_proj`.
    """
    o_proj = getattr(getattr(block, "self_attn", None), "o_proj", None)
    if o_proj is None:
        raise ModelError(f"block {layer} has no attention module that can be aligned: expected self_attn with o_proj")
    return o_proj


def head_count(text_config: Any, block: Any, layer: int) -> int:
    """Return the number of attention heads of a block, from the configuration of its language model.

    Raises:
        ModelError: the block has no o_proj, or its input does not divide into so many heads.
    """
    width, count = output_projection(block, layer).in_features, int(text_config.num_attention_heads)
    if width % count:
        raise ModelError(f"o_proj of block {layer} takes {width} features: expected a multiple of {count}, its heads")
    return count


def attention_heads(model: Any, layers: Sequence[int]) -> list[Head]:
    """Return all attention heads of some layers of a transformers model, in ascending order.

    Raises:
        ModelError: a layer's attention has no o_proj.
    """
    decoder, text = model.get_decoder(), model.config.get_text_config()
    blocks = getattr(decoder, "model", decoder).layers
    return [(layer, head) for layer in sorted(layers) for head in range(head_count(text, blocks[layer - 1], layer))]


def head_outputs(concatenated: Float[Tensor, "*batch d"], heads: int, head: int) -> Float[Tensor, "*batch width"]:
    """Return the output of attention head `head` (from 0), a part of o_proj's input with `heads` heads."""
    width = concatenated.shape[-1] // heads
    return concatenated[..., head * width : (head + 1) * width]
