"""Attention knockout: some positions may not attend to some tokens."""

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
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch
from workbench.mllm.logits import logits_at_end, positions_to_keep


@dataclass(frozen=True)
class Blocked:
    """Pairs of query and key positions that are blocked in some blocks.

    Attributes:
        blocks: numbers 1 to L.
        rows: query positions that may not attend to `keys`.
        keys: key positions that `rows` may not attend to.
        seen: the blocks in which the pairs were in fact blocked; filled while the model runs.
    """

    blocks: frozenset[int]
    rows: Bool[Tensor, "sample query"]
    keys: Bool[Tensor, "sample key"]
    seen: set[int] = field(default_factory=set)

    def mask(self, block: int, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return the attention mask of a block without the blocked pairs."""
        self.seen.add(block)
        queries, keys = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - queries) if causal else mask
        pairs = (self.rows[:, :, None] & self.keys[:, None, :keys])[:, None].to(query.device)
        mask = mask[..., :keys]
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
    """Compute attention by sdpa without the blocked pairs."""
    block = int(getattr(module, "layer_idx", -1)) + 1
    if blocked is not None and block in blocked.blocks:
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        attention_mask = blocked.mask(block, query, key, attention_mask, causal)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


BLOCKING = "sdpa_with_blocked_pairs"
AttentionInterface.register(BLOCKING, _attention_blocked)
AttentionMaskInterface.register(BLOCKING, sdpa_mask)


@contextmanager
def blocking(mllm: MLLM, blocked: Blocked) -> Iterator[None]:
    """Let the language model accept `blocked=` within a `with` block, and check that it was applied in every block.

    Raises:
        ModelError: the model caps its attention scores, or a block has no attention of the usual kind.
    """
    check_uncapped(mllm)
    with attention_implementation(mllm, BLOCKING):
        yield
    if blocked.blocks - blocked.seen:
        raise ModelError(
            f"{mllm.name}: blocks {sorted(blocked.blocks - blocked.seen)} have no attention of the usual kind to"
            " knock out: expected other blocks"
        )


def knockout(
    mllm: MLLM, batch: Batch, *, blocks: Sequence[int], keep: int = 1
) -> Float[Tensor, "sample position vocab"]:
    """Return the logits of each sample's last `keep` tokens when only visual tokens may attend to visual tokens.

    All other positions cannot attend to them in `blocks`. Padding does not count, on whichever side it is.

    Args:
        blocks: numbers 1 to L.
        keep: for how many tokens at the end of each prompt.

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
        output = mllm.model(
            **batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch, keep), blocked=blocked
        )
        return logits_at_end(output.logits, batch, keep).cpu()
