"""Hide a share of the visual tokens from the language model while it trains (`alignment.mask`).

    e_i <- (1/|V|) sum_{j in V} e_j    for the hidden tokens i of an image or tile, whose visible tokens are V

The replacement takes place at the input of the first block, so what a hidden token predicts can only come from the
visible tokens. The alignment loss is then a mean over the hidden tokens alone. Hidden tokens are drawn anew in every
forward pass, as dropout is; in evaluation none is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.errors import DataError, ModelError
from workbench.mllm import VisualTokens
from workbench.mllm.family import family_of


class TokenMask:
    """Hides visual tokens of a model; made by `attach_mask`.

    Args:
        share: share of the tokens of an image or tile that are hidden.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        # of the present forward pass: (row, column) of each visual token, its image or tile, and whether it is hidden
        self._drawn: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def draw(self, visual: Sequence[Sequence[VisualTokens]]) -> Bool[Tensor, " token"] | None:
        """Draw the tokens that the next forward pass hides, and return whether each is hidden, in order of the batch.

        The draws use torch's generator on the CPU, whose state checkpoints store.

        Args:
            visual: the visual tokens, [sample][image or tile]. Without any there is nothing to hide: None.
        """
        parts = [(row, part.index) for row, sample in enumerate(visual) for part in sample]
        self._drawn = None
        if not parts:
            return None
        rows, images = (
            torch.cat([torch.full((len(index),), number) for number, index in numbered])
            for numbered in (parts, [(number, index) for number, (_, index) in enumerate(parts)])
        )
        columns = torch.cat([index.cpu() for _, index in parts])
        hidden = torch.cat([_hidden(len(index), self.share) for _, index in parts])
        self._drawn = rows, columns, images, hidden
        return hidden

    def hide(
        self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]] | None:
        """Replace the hidden tokens in the input of the first block, if it is in training; a forward pre-hook.

        It runs again when activation checkpointing recomputes the block, with the same tokens hidden.
        """
        if self._drawn is None or not block.training:
            return None
        replaced = self._replaced(args[0] if args else kwargs["hidden_states"])
        return ((replaced, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": replaced})

    def _replaced(self, states: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        assert self._drawn is not None
        rows, columns, images, hidden = (part.to(states.device, non_blocking=True) for part in self._drawn)
        tokens = states[rows, columns]
        visible = (~hidden).to(tokens.dtype)[:, None]
        count = int(self._drawn[2][-1]) + 1
        sums = tokens.new_zeros(count, tokens.shape[-1]).index_add(0, images, tokens * visible)
        counts = visible.new_zeros(count, 1).index_add(0, images, visible)
        means = sums / counts
        result = states.clone()
        result[rows, columns] = torch.where(hidden[:, None], means[images], tokens)
        return result


def attach_mask(model: Any, share: float) -> TokenMask:
    """Make a transformers model hide the visual tokens that the returned mask draws.

    Raises:
        ModelError: the model adds features of the vision encoder to later layers too, where they would not be hidden.
    """
    family = family_of(model.config)
    if family.injected_blocks(model.config):
        raise ModelError(
            f"alignment.mask is {share}, but {family.name} adds features of its vision encoder to the output of several"
            " blocks, which would show the hidden tokens: expected alignment.mask 0"
        )
    mask, decoder = TokenMask(share), model.get_decoder()
    getattr(decoder, "model", decoder).layers[0].register_forward_pre_hook(mask.hide, with_kwargs=True)
    return mask


def loss_tokens(tokens: int, share: float) -> int:
    """Return over how many of the `tokens` of an image or tile the alignment loss is a mean.

    Without a mask these are all; with one the hidden tokens: share * tokens, rounded, at least 1 and not all.

    Raises:
        DataError: there is only one token, which cannot be hidden, since another one must stay visible.
    """
    if share == 0:
        return tokens
    if tokens < 2:
        raise DataError(
            f"alignment.mask is {share}, but an image or tile has one visual token: expected two or more, since one"
            " must stay visible, or alignment.mask 0"
        )
    return max(1, min(tokens - 1, round(share * tokens)))


def _hidden(tokens: int, share: float) -> Bool[Tensor, " token"]:
    """Return a random choice of `loss_tokens(tokens, share)` of the tokens of an image or tile."""
    hidden = torch.zeros(tokens, dtype=torch.bool)
    hidden[torch.randperm(tokens)[: loss_tokens(tokens, share)]] = True
    return hidden
