"""Numbers of parameters of a model by part, and sizes of its files in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer import distributed
from trainer.build.partition import parts_of
from workbench.weights.model_files import WeightFiles

# bytes of a value; gradients, AdamW's moments and all weights but frozen ones (optim.frozen_precision) are float32 in
# bfloat16 training too, which is autocast
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a model.

    Attributes:
        parts: (all, trained) parameters of each part: tower (vision encoder), connector (projector), language, lora,
            head (alignment heads), residual.
        block: parameters of the largest block of language model or vision encoder; sharded training gathers one block
            at a time.
        outside: parameters outside the blocks, which sharded training gathers together.
        encoder_blocks: number of blocks of the vision encoder.
        halved: parameters that are stored in bfloat16.
    """

    parts: dict[str, tuple[int, int]]
    block: int
    outside: int
    encoder_blocks: int = 0
    halved: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(count for count, _ in self.parts.values())

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(count for _, count in self.parts.values())

    @property
    def weights(self) -> int:
        """Bytes of all weights in memory."""
        return FLOAT * self.total - (FLOAT - HALF) * self.halved


def sizes_of(model: Any, alignment: nn.Module | None = None, residual: nn.Module | None = None) -> Sizes:
    """Count the parameters of a transformers model and of what is attached to it; tied parameters count once."""
    counts, part_by_name = dict.fromkeys(("tower", "connector", "language", "lora"), (0, 0)), parts_of(model)
    for name, p in model.named_parameters():
        part = "lora" if ".lora_" in name else part_by_name[name]
        counts[part] = (counts[part][0] + p.numel(), counts[part][1] + p.numel() * p.requires_grad)
    for part, module in (("head", alignment), ("residual", residual)):
        count = sum(p.numel() for p in module.parameters()) if module is not None else 0
        counts[part] = (count, count)

    def block_sizes(parent: Any) -> list[int]:
        classes = set(model._no_split_modules or ())
        blocks = [module for module in parent.modules() if type(module).__name__ in classes]
        return [sum(p.numel() for p in block.parameters()) for block in blocks]

    all_blocks, encoder_blocks = block_sizes(model), block_sizes(model.get_encoder(modality="image"))
    total = sum(count for count, _ in counts.values())
    halved = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    return Sizes(counts, max(all_blocks, default=0), total - sum(all_blocks), len(encoder_blocks), halved)


def weights_line(part: str, weights: WeightFiles | None) -> str:
    """Describe the weight files of a part of the model; None means that they are still on the hub."""
    if weights is None:
        return f"{part}: downloaded from the hub when training begins"
    count = f"{len(weights.files)} file{'s' * (len(weights.files) != 1)}"
    pickled = ", pickled (read without running code)" if weights.pickled else ""
    return f"{part}: {count}, {gigabytes(weights.bytes)}{pickled}"


def gigabytes(size: int) -> str:
    """Write a number of bytes as GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def checkpoint_bytes(sizes: Sizes) -> int:
    """Return the bytes of a checkpoint: weights, heads, and AdamW's two moments of every trained parameter.

    Sharded training writes its weights twice. A model with LoRA also has a file of its trained parameters alone, to
    resume from.
    """
    weights = FLOAT * sizes.total * (2 if distributed.strategy() != "ddp" else 1)
    adapters = FLOAT * sizes.trained if sizes.parts.get("lora", (0, 0))[0] else 0
    return weights + 2 * FLOAT * sizes.trained + adapters
