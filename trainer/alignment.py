"""Visual representation alignment: the head and the loss (VIRAL, arXiv 2509.07979, section on L_VRA)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AlignmentHead(nn.Sequential):
    """P_pi: a three-layer MLP with SiLU from the language model's width to the VFM's (PAPER.md: D -> hidden -> hidden -> dim)."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))


def cosine_loss(predicted: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """L_VRA = -(1/N) sum_i cos(P_pi(e_i), y_i), in -1..1; no gradient reaches the target."""
    return -torch.nn.functional.cosine_similarity(predicted.float(), target.detach().float(), dim=-1).mean()
