"""Losses of the alignment (equations: docs/concepts/alignment_loss.md), the head P_pi, and the schedule of lambda."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AlignmentHead(nn.Sequential):
    """The projection P_pi: a three-layer MLP with SiLU, width -> hidden -> hidden -> dim (docs/paper.md).

    Args:
        width: of the visual tokens inside the language model.
        hidden: of the two hidden layers.
        dim: of the target features.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )


def cosine_loss(predicted: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """Return L_VRA = -(1/N) sum_i cos(P_pi(e_i), y_i), from -1 to 1; no gradient reaches the target."""
    return -torch.nn.functional.cosine_similarity(predicted.float(), target.detach().float(), dim=-1).mean()


def relation_loss(predicted: Float[Tensor, "token d"], target: Float[Tensor, "token dim"]) -> Float[Tensor, ""]:
    """Return L_rel = (1/N^2) sum_ij (cos(p_i, p_j) - cos(y_i, y_j))^2 over the N tokens of one image, from 0 to 4.

    No gradient reaches the target. The mean includes the diagonal, whose terms are 0, as in the official code. The
    widths d and dim may differ.
    """
    p, y = (nn.functional.normalize(values.float(), dim=-1) for values in (predicted, target.detach()))
    # autocast would compute both products in bfloat16, but the loss is their small difference
    with torch.autocast(p.device.type, enabled=False):
        return nn.functional.mse_loss(p @ p.T, y @ y.T)


def predict_loss(predicted: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """Return L_pred = (1/(N d)) sum_i |P_pi(e_i) - norm(y_i)|^2; no gradient reaches the target.

    norm(y) = (y - mean(y)) / sqrt(var(y) + 1e-6) over the d features of a token: a layer norm without weights, as
    data2vec (arXiv 2202.03555) normalizes its targets. Predicting 0 costs 1.
    """
    y = nn.functional.layer_norm(target.detach().float(), target.shape[-1:], eps=1e-6)
    return nn.functional.mse_loss(predicted.float(), y)


def mean_loss(losses: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the unweighted mean of the losses of all layers and targets."""
    return torch.stack(list(losses.values())).mean()


def weight_at(
    step: int, *, steps: int, weight: float, schedule: str = "constant", final: float = 0.0, warmup: int = 0
) -> float:
    """Return lambda in L = L_LM + lambda * L_VRA at optimizer step `step`, counted from 0.

    Lambda depends on the step alone, so a resumed run continues with the same values. It first rises over `warmup`
    steps as weight * (step + 1) / warmup. Then it stays at `weight` (constant) or approaches `final`, which it reaches
    at the last step; with t from 0 to 1 over these steps, it is

        linear: weight + (final - weight) * t
        cosine: final + (weight - final) * (1 + cos(pi * t)) / 2
    """
    if step < warmup:
        return weight * (step + 1) / warmup
    if schedule == "constant":
        return weight
    between = steps - 1 - warmup
    t = min(1.0, (step - warmup) / between) if between > 0 else 1.0
    return final + (weight - final) * (1 - t if schedule == "linear" else (1 + math.cos(math.pi * t)) / 2)
