"""Answers drawn at a temperature, the same ones whatever batch a question is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from workbench.data.base import Sample, content_hash
from workbench.errors import ConfigError


class Sampler(LogitsProcessor):
    """Draws the next token of each answer from the softmax of logits / temperature.

    It adds Gumbel noise, so that the largest value is such a draw (Gumbel 1954; Maddison et al. 2014); the noise of an
    answer has a generator of its own. Nothing is cut off the distribution (no top-k, no top-p).

    Args:
        temperature: above 0.
        samples: the questions of the batch.
        seed: of all draws.
        draw: number of the draw.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(self, temperature: float, samples: Sequence[Sample], *, seed: int, draw: int) -> None:
        if not temperature > 0:
            raise ConfigError(f"temperature is {temperature:g}: expected a number above 0; greedy decoding needs none")
        self.temperature = temperature
        self._generators = [
            torch.Generator().manual_seed(int(content_hash("answer", seed, draw, sample.id), 16) % 2**63)
            for sample in samples
        ]

    def __call__(
        self, input_ids: Int[Tensor, "answer s"], scores: Float[Tensor, "answer vocab"]
    ) -> Float[Tensor, "answer vocab"]:
        """Return the logits over the temperature plus noise."""
        noise = [-torch.empty(scores.shape[1]).exponential_(generator=g).log() for g in self._generators]
        return scores.float() / self.temperature + torch.stack(noise).to(scores.device)
