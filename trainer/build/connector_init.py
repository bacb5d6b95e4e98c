"""How a new projector starts: on inputs of unit deviation, with an estimate of each token's place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
)


def input_deviation(inputs: Float[Tensor, "image token d"]) -> float:
    """Mean standard deviation of a connector input channel."""
    return float(inputs.flatten(0, 1).std(0).mean())


def start_connector(llava: LlavaForConditionalGeneration, inputs: Float[Tensor, "image token d"], side: int) -> None:
    """Give the connector a first layer that fits its inputs.

    Its units see inputs of mean 0 and deviation 1, folded into weight and bias, in random directions; the first few
    instead start as the least-squares estimate of each token's place (sine and cosine of row and column, and their
    negatives). A vision encoder carries that place faintly, and a language model with one-dimensional positions finds
    the column last or never.
    """
    first = llava.model.multi_modal_projector.linear_1
    tokens = inputs.flatten(0, 1)
    mean, std = tokens.mean(0), tokens.std(0).clamp_min(1e-6)
    standard = ((tokens - mean) / std).double()
    code = _place_code(side).repeat(len(inputs), 1)
    ridge = standard.T @ standard + 0.01 * len(standard) * torch.eye(len(std), dtype=torch.float64)
    place = torch.linalg.solve(ridge, standard.T @ code).T.float()
    with torch.no_grad():
        nn.init.normal_(first.weight, std=len(std) ** -0.5)
        first.weight[: 2 * len(place)] = torch.cat([place, -place])
        first.weight /= std
        first.bias.copy_(-first.weight @ mean)


def _place_code(side: int) -> Float[Tensor, "token channel"]:
    """Sine and cosine of half and whole turns over rows and columns, in raster order; every channel has mean 0 and
    deviation 1."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    waves = torch.stack([f(turns * torch.pi * at) for turns in (1, 2) for f in (torch.sin, torch.cos)], dim=-1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    code = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return (code - code.mean(0)) / code.std(0)
