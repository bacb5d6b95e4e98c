"""Initialize a new projector: standardized inputs, and an estimate of each visual token's row and column."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


def mean_channel_std(features: Float[Tensor, "image token d"]) -> float:
    """Return the standard deviation of a channel over all tokens of all images, averaged over the channels."""
    return float(features.flatten(0, 1).std(0).mean())


def init_projector(llava: LlavaForConditionalGeneration, inputs: Float[Tensor, "image token d"], side: int) -> None:
    """Initialize the projector's first layer so that it fits the features that the projector receives.

    Each unit has random weights on inputs standardized to mean 0 and standard deviation 1; the standardization is
    folded into weight and bias. The first few units instead start as a least-squares estimate of each token's position
    in the patch grid (sines and cosines of row and column, and their negatives). The vision encoder's features carry
    this position only weakly, and a language model with one-dimensional positions learns the column last or never.

    Args:
        inputs: what the projector receives for a sample of images.
        side: patches per side of the (square) patch grid.
    """
    first = llava.model.multi_modal_projector.linear_1
    tokens = inputs.flatten(0, 1)
    mean, std = tokens.mean(0), tokens.std(0).clamp_min(1e-6)
    standardized = ((tokens - mean) / std).double()
    code = _position_code(side).repeat(len(inputs), 1)
    # ridge regression of the position code on the standardized features
    gram = standardized.T @ standardized + 0.01 * len(standardized) * torch.eye(len(std), dtype=torch.float64)
    position_weights = torch.linalg.solve(gram, standardized.T @ code).T.float()
    with torch.no_grad():
        nn.init.normal_(first.weight, std=len(std) ** -0.5)
        first.weight[: 2 * len(position_weights)] = torch.cat([position_weights, -position_weights])
        first.weight /= std
        first.bias.copy_(-first.weight @ mean)


def _position_code(side: int) -> Float[Tensor, "token channel"]:
    """Return a code of each token's position in the patch grid, tokens row by row.

    The channels are the sine and cosine of half a turn and of a whole turn over the rows, and the same over the
    columns; each is standardized to mean 0 and standard deviation 1.
    """
    position = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    waves = torch.stack(
        [f(half_turns * torch.pi * position) for half_turns in (1, 2) for f in (torch.sin, torch.cos)], dim=-1
    )
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    code = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return (code - code.mean(0)) / code.std(0)
