"""Logits of a batch: where they are read, and that they are numbers."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from workbench.mllm.family import Batch
from workbench.mllm.validate import not_finite


class Finite(LogitsProcessor):
    """Refuses the logits of an overflow, the largest of which would be taken as an answer."""

    def __init__(self, mllm: Any) -> None:
        self.mllm = mllm

    def __call__(
        self, input_ids: Int[Tensor, "answer s"], scores: Float[Tensor, "answer vocab"]
    ) -> Float[Tensor, "answer vocab"]:
        """Return the logits as they are."""
        if not scores.amax(-1).isfinite().all():
            raise not_finite(self.mllm)
        return scores


def logits_at_end(
    logits: Float[Tensor, "sample s vocab"], batch: Batch, keep: int
) -> Float[Tensor, "sample keep vocab"]:
    """Return the logits at the last `keep` positions of each sample that are not padding, on whichever side that is.

    Args:
        logits: at the last positions of the batch, as `positions_to_keep` counts them, or at all.
    """
    mask = batch.inputs["attention_mask"]
    last = logits.shape[1] - 1 - mask.flip(1).long().argmax(1)
    positions = last[:, None] - torch.arange(keep - 1, -1, -1, device=mask.device)
    return logits[torch.arange(len(mask), device=mask.device)[:, None], positions].float()


def positions_to_keep(batch: Batch, keep: int = 1) -> int:
    """Return how many last positions of the batch contain the last `keep` real tokens of each sample."""
    return int(batch.inputs["attention_mask"].flip(1).long().argmax(1).max()) + keep
