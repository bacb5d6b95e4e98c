"""Store the frozen matrices of a model in bfloat16 (`optim.frozen_precision`), which halves the memory that they take.

Only what autocast rounds to bfloat16 in every pass anyway is stored rounded: the matrices of linear layers. Embeddings,
norms, biases and convolutions stay float32, and so does everything that is trained. The losses and gradients are
therefore the same, to the bit, as those of float32 storage under `optim.precision: bfloat16`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

HALF = torch.bfloat16


def halve_frozen(model: nn.Module) -> None:
    """Convert the frozen matrices of the linear layers of `model` to bfloat16, in place.

    A matrix that another module uses too, such as an embedding tied to the output head, stays float32.
    """
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    elsewhere = {
        id(p) for module in model.modules() if type(module) is not nn.Linear for p in module.parameters(recurse=False)
    }
    for layer in linear:
        if not layer.weight.requires_grad and id(layer.weight) not in elsewhere:
            layer.weight.data = layer.weight.data.to(HALF)


def is_halved(model: nn.Module) -> bool:
    """Return whether some matrices of `model` are stored in bfloat16."""
    return any(p.dtype == HALF for p in model.parameters())


def half_autocast(model: nn.Module) -> AbstractContextManager[object]:
    """Return autocast to bfloat16 if `model` has matrices in bfloat16, which cannot be used without it."""
    return torch.autocast(next(model.parameters()).device.type, HALF) if is_halved(model) else nullcontext()


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors to be stored: those in bfloat16 as float32, on the CPU, since a GPU may not have room for both."""
    return {name: value.cpu().float() if value.dtype == HALF else value for name, value in state.items()}
