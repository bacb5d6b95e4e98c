"""How many parameters a model has, by part, and how many bytes its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer import distributed
from trainer.build.partition import parts_of
from workbench.weights.model_files import WeightFiles

# bytes: weights, gradients and both moments of AdamW are float32, also in bfloat16 training, which is autocast
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model on meta.

    Attributes:
        parts: parameters and trained parameters of each part: tower, connector, language, head, residual, lora.
        block: parameters of its largest decoder or tower block, which sharded training gathers one at a time.
        outside: parameters outside the blocks, which are gathered together.
        tower_blocks: how many of the blocks are the vision encoder's.
    """

    parts: dict[str, tuple[int, int]]
    block: int
    outside: int
    tower_blocks: int = 0

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.parts.values())

    @property
    def trained(self) -> int:
        return sum(count for _, count in self.parts.values())


def sizes_of(model: Any, alignment: nn.Module | None = None, residual: nn.Module | None = None) -> Sizes:
    """Count the parameters of a transformers model and of what is attached to it; tied ones count once."""
    counts, found = dict.fromkeys(("tower", "connector", "language", "lora"), (0, 0)), parts_of(model)
    for name, p in model.named_parameters():
        part = "lora" if ".lora_" in name else found[name]
        counts[part] = (counts[part][0] + p.numel(), counts[part][1] + p.numel() * p.requires_grad)
    for part, module in (("head", alignment), ("residual", residual)):
        count = sum(p.numel() for p in module.parameters()) if module is not None else 0
        counts[part] = (count, count)

    def blocks(below: Any) -> list[int]:
        kinds = set(model._no_split_modules or ())
        return [
            sum(p.numel() for p in module.parameters()) for module in below.modules() if type(module).__name__ in kinds
        ]

    every = blocks(model)
    total = sum(count for count, _ in counts.values())
    return Sizes(counts, max(every, default=0), total - sum(every), len(blocks(model.get_encoder(modality="image"))))


def weights_line(part: str, weights: WeightFiles | None) -> str:
    """What is said of the weight files of a part of the model."""
    if weights is None:
        return f"{part}: fetched from the hub when training begins"
    count = f"{len(weights.files)} file{'s' * (len(weights.files) != 1)}"
    return (
        f"{part}: {count},"
        f" {gigabytes(weights.bytes)}{', pickled (read without running code)' if weights.pickled else ''}"
    )


def gigabytes(size: int) -> str:
    """`size` bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def checkpoint_bytes(sizes: Sizes) -> int:
    """Weights and heads, and both moments of what is trained; sharded training writes its weights twice."""
    weights = FLOAT * sizes.total * (2 if distributed.strategy() != "ddp" else 1)
    adapted = FLOAT * sizes.trained if sizes.parts.get("lora", (0, 0))[0] else 0  # a file of their own, to go on from
    return weights + 2 * FLOAT * sizes.trained + adapted
