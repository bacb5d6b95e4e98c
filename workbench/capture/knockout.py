"""Attention knockout: tokens that some positions may not attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workbench.capture.attention import attention_implementation, check_uncapped
from workbench.capture.hidden_states import check_layers
from workbench.errors import ModelError
from workbench.mllm.base import MLLM, last_logits, positions_to_keep
from workbench.mllm.family import Batch


@dataclass(frozen=True)
class Blocked:
    """Query positions that may not look at some keys in some blocks (1 to L); `seen` are the blocks in which that was
    done."""

    blocks: frozenset[int]
    rows: Bool[Tensor, "sample query"]
    keys: Bool[Tensor, "sample key"]
    seen: set[int] = field(default_factory=set)

    def mask(self, block: int, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The attention mask of a block with the blocked pairs taken out."""
        self.seen.add(block)
        lengths = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(1, 1, *lengths, dtype=torch.bool, device=query.device)
            mask = mask.tril(lengths[1] - lengths[0]) if causal else mask
        pairs = (self.rows[:, :, None] & self.keys[:, None, : lengths[1]])[:, None].to(query.device)
        mask = mask[..., : lengths[1]]
        return mask & ~pairs if mask.dtype == torch.bool else mask.masked_fill(pairs, torch.finfo(mask.dtype).min)


def _attention_blocked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    blocked: Blocked | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """sdpa without the blocked pairs."""
    block = int(getattr(module, "layer_idx", -1)) + 1
    if blocked is not None and block in blocked.blocks:
        causal = options.get("is_causal")
        attention_mask = blocked.mask(
            block, query, key, attention_mask, bool(getattr(module, "is_causal", True) if causal is None else causal)
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


BLOCKING = "sdpa_with_blocked_pairs"
AttentionInterface.register(BLOCKING, _attention_blocked)
AttentionMaskInterface.register(BLOCKING, sdpa_mask)


@contextmanager
def blocking(mllm: MLLM, blocked: Blocked) -> Iterator[None]:
    """Let the language model understand `blocked=` for a while, and see that it was done in every block that was asked
    for."""
    check_uncapped(mllm)
    with attention_implementation(mllm, BLOCKING):
        yield
    if blocked.blocks - blocked.seen:
        raise ModelError(
            f"{mllm.name}: blocks {sorted(blocked.blocks - blocked.seen)} have no attention of the usual kind to"
            " knock out"
        )


def knockout(mllm: MLLM, batch: Batch, *, blocks: Sequence[int]) -> Float[Tensor, "sample vocab"]:
    """Logits of each sample's last token when, in `blocks` (1 to L), no other position looks at the visual tokens;
    these still look at one another.

    The last token is that before the padding, on whichever side that is.

    Raises:
        ConfigError: a block that the model does not have.
        ModelError: the model caps its attention scores, or a block has no attention of the usual kind.
    """
    wanted = check_layers(mllm, blocks, first=1)
    keys = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    for row, parts in enumerate(mllm.visual_tokens(batch)):
        for part in parts:
            keys[row, part.index] = True
    blocked = Blocked(frozenset(wanted), ~keys, keys)
    with mllm.lock, torch.inference_mode(), blocking(mllm, blocked):
        return last_logits(
            mllm.model(**batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch), blocked=blocked), batch
        ).cpu()
