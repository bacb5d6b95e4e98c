"""Dropout on what the blocks add to the residual stream: an ordinary regularizer that alignment is compared with."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Apply dropout to what each decoder block adds to the residual stream, while the model trains.

    This is GPT-2's `resid_pdrop`: dropout on the outputs of attention and MLP, and nowhere else. It is done by forward
    hooks, so the saved model does not have it. Call this after `add_lora`, which replaces the layers that get a hook.

    Args:
        rate: share of the values that is set to 0; the others are multiplied by 1 / (1 - rate).
    """
    decoder: Any = model.get_decoder()
    for block in getattr(decoder, "model", decoder).layers if rate else ():
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.register_forward_hook(partial(_dropout, rate))


def _dropout(rate: float, layer: nn.Module, _: object, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, rate, training=layer.training)
