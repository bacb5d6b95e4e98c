"""Dropout on the residual stream: the ordinary regularizer that alignment is compared with."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """While training, let a random share `rate` of what each decoder block adds to the residual stream be 0, and the
    rest 1 / (1 - rate) times as large.

    That is GPT-2's `resid_pdrop`, on the outputs of attention and MLP, and nothing else. Hooks do it, so that the model
    is saved as it is without them; call it after LoRA, which puts other layers in the place of those that have a hook.
    """
    decoder: Any = model.get_decoder()
    for block in getattr(decoder, "model", decoder).layers if rate else ():
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.register_forward_hook(partial(_drop, rate))


def _drop(rate: float, layer: nn.Module, _: object, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, rate, training=layer.training)
