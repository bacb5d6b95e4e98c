"""Attention of chosen query positions, its gradient, and attention rollout.

A row is one query position's attention probabilities over all keys. The whole matrix is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workbench.capture.hidden_states import Copies, check_layers
from workbench.errors import ConfigError, ModelError
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch


@dataclass(frozen=True)
class _Scores:
    """Everything that determines the attention probabilities of one block."""

    query: Float[Tensor, "sample head key d"]
    key: Float[Tensor, "sample group key d"]
    mask: Tensor | None
    scaling: float | None
    causal: bool

    def rows(self, rows: Int[Tensor, "sample row"]) -> Float[Tensor, "sample head row key"]:
        """Return softmax(q k^T * scaling + mask) of these query positions, in float32."""
        batch, heads, length, width = self.query.shape
        rows = rows.to(self.query.device)
        index = rows[:, None, :, None]
        queries = self.query.gather(2, index.expand(batch, heads, rows.shape[1], width))
        grouped = queries.unflatten(1, (self.key.shape[1], -1))  # heads that share a key, side by side
        scaling = width**-0.5 if self.scaling is None else self.scaling
        scores = ((grouped @ self.key[:, :, None].mT) * scaling).flatten(1, 2).float()
        if self.mask is not None:
            mask = self.mask.expand(batch, -1, length, -1)[..., : self.key.shape[2]]
            mask = mask.gather(2, index.expand(batch, mask.shape[1], rows.shape[1], mask.shape[3]))
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        elif self.causal:
            scores = scores.masked_fill(torch.arange(self.key.shape[2], device=rows.device) > index, -torch.inf)
        return scores.softmax(-1)


@dataclass
class _Rows:
    """Collects the attention probabilities of some query positions while the model runs, by block."""

    rows: Int[Tensor, "sample row"]
    blocks: set[int]
    by_block: dict[int, Any] = field(default_factory=dict)
    copies: Copies = field(default_factory=Copies)

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        """Keep what is wanted of one block, and return the attention output that the block goes on with."""
        rows = scores.rows(self.rows).to(scores.query.dtype)
        self.by_block[block] = self.copies.empty(rows.device, *rows.shape, dtype=rows.dtype)
        self.copies.start(rows, self.by_block[block])
        return output


class _Gradients(_Rows):
    """Computes the output of the wanted rows from their probabilities, so that gradients reach the probabilities.

    Kept for each block: the probabilities, and a tensor of zeros added to them that receives the gradient.
    """

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        rows = self.rows.to(output.device)
        probabilities = scores.rows(rows)
        leaf = torch.zeros_like(probabilities, requires_grad=True)
        self.by_block[block] = (probabilities.detach(), leaf)
        values = value.repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)  # one for each head
        row_output = ((probabilities + leaf).to(value.dtype) @ values).transpose(1, 2)
        return output.scatter(1, rows[:, :, None, None].expand_as(row_output), row_output)


class _AllScores(_Rows):
    """Keeps the queries and keys of every block."""

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        self.by_block[block] = scores
        return output


def _attention_with_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    collect_rows: _Rows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention by sdpa, and the few rows that `collect_rows` wants beside it."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(
            "this model's attention is not a plain softmax of scores (it has softcap or sinks), so its rows cannot be"
            " read: expected a model with plain attention"
        )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    block = int(getattr(module, "layer_idx", -1)) + 1
    if collect_rows is not None and block in collect_rows.blocks:
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        output = collect_rows.take(
            block, _Scores(query, key, attention_mask, options.get("scaling"), causal), value, output
        )
    return output, None


ROWS = "sdpa_with_rows"
AttentionInterface.register(ROWS, _attention_with_rows)
AttentionMaskInterface.register(ROWS, sdpa_mask)


def attention(
    mllm: MLLM, batch: Batch, *, rows: Sequence[Sequence[int]], layers: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "sample head row key"]]:
    """Return the attention probabilities of chosen query positions, block by block, from one forward pass.

    Args:
        rows: query positions in `input_ids` for each sample, the same number for all; negative ones count from the end.
        layers: blocks (1 to L) in the order wanted; by default all.

    Raises:
        ConfigError: a layer or position that does not exist, or a position of padding.
        ModelError: the model caps its attention scores, or a block has no attention of the usual kind.
    """
    wanted = check_layers(mllm, layers, first=1)
    collector = _Rows(_positions(batch, rows), set(wanted))
    with torch.inference_mode():
        _collect(mllm, batch, collector, keep=1)
    return (collector.by_block.pop(layer) for layer in wanted)


def gradient_attention(
    mllm: MLLM, batch: Batch, *, rows: Sequence[int], layers: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "sample head key"]]:
    """Return attention probabilities times the gradient of the predicted token's logit with respect to them.

    This is for one query position of each sample, block by block, with its sign: a positive value means that more
    attention to that key would raise the logit, to first order. Only the gradient of that row is computed (other rows
    of the same block count as fixed). Chefer et al. 2021 (eq. 5) take the positive part and the mean over heads.

    Args:
        rows: the query position of each sample; negative ones count from the end.
        layers: as in `attention`.

    Raises:
        ConfigError, ModelError: as `attention`.
    """
    wanted = check_layers(mllm, layers, first=1)
    collector = _Gradients(_positions(batch, [[row] for row in rows]), set(wanted))
    trained = [parameter for parameter in mllm.model.parameters() if parameter.requires_grad]
    mllm.model.requires_grad_(False)
    try:
        with torch.enable_grad():
            positions, index = collector.rows[:, 0].unique(return_inverse=True)
            logits = _collect(mllm, batch, collector, keep=positions.to(mllm.device))
            # one backward pass for the sum: samples do not influence one another
            score = logits[torch.arange(len(batch)), index].float().amax(-1).sum()
            gradients = torch.autograd.grad(score, [collector.by_block[layer][1] for layer in wanted])
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return (
        (collector.by_block.pop(layer)[0] * gradient)[:, :, 0].cpu()
        for layer, gradient in zip(wanted, gradients, strict=True)
    )


def rollout(mllm: MLLM, batch: Batch, *, rows: Sequence[int], chunk: int = 256) -> Float[Tensor, "sample key"]:
    """Return the attention rollout (Abnar and Zuidema 2020) of one query position of each sample; rows sum to 1.

    Rollout is the product over blocks of (A + I) / 2, where A is the mean of attention over heads. It ignores values
    and MLPs. The product is computed from the last block down and for one row only, so that no more than `chunk` rows
    of an attention matrix exist at once.

    Args:
        rows: the query position of each sample; negative ones count from the end.
        chunk: rows of an attention matrix computed at a time; it changes memory and speed only.

    Raises:
        ConfigError, ModelError: as `attention`.
    """
    wanted = check_layers(mllm, None, first=1)
    collector = _AllScores(_positions(batch, [[row] for row in rows]), set(wanted))
    with torch.inference_mode():
        _collect(mllm, batch, collector, keep=1)
        length = batch.inputs["input_ids"].shape[1]
        flow = torch.zeros(len(batch), length, device=mllm.device).scatter_(1, collector.rows.to(mllm.device), 1.0)
        for block in reversed(wanted):
            scores, attended = collector.by_block.pop(block), torch.zeros_like(flow)
            for part in torch.arange(length).split(chunk):
                # rows of padding attend to nothing (NaN here), and nothing flows to them
                mean = scores.rows(part.expand(len(batch), -1)).mean(1).nan_to_num()
                attended += (flow[:, None, part] @ mean)[:, 0]
            flow = (flow + attended) / 2
    return flow.cpu()


def _collect(mllm: MLLM, batch: Batch, collector: _Rows, *, keep: int | Tensor) -> Tensor:
    """Run the model with `collector` in its attention and return the logits of the positions to keep."""
    check_uncapped(mllm)
    with mllm.lock, attention_implementation(mllm, ROWS):
        logits = mllm.model(**batch.inputs, use_cache=False, logits_to_keep=keep, collect_rows=collector).logits
        collector.copies.finish()
    missing = collector.blocks - set(collector.by_block)
    if missing:
        raise ModelError(
            f"{mllm.name}: blocks {sorted(missing)} have no attention of the usual kind to read: expected other layers"
        )
    return logits


def check_uncapped(mllm: MLLM) -> None:
    """Raise a ModelError if the model caps its attention scores: sdpa, which capture needs, cannot do that."""
    cap = getattr(mllm.config.get_text_config(), "attn_logit_softcapping", None)
    if cap:
        raise ModelError(
            f"{mllm.name} caps its attention scores (attn_logit_softcapping {cap}): its attention cannot be read or"
            " knocked out row by row"
        )


def _positions(batch: Batch, rows: Sequence[Sequence[int]]) -> Int[Tensor, "sample row"]:
    """Return query positions as a tensor, counted from the start; raise a ConfigError if they are not of the prompt."""
    mask = batch.inputs["attention_mask"].cpu()
    length = mask.shape[1]
    counts = sorted({len(sample_rows) for sample_rows in rows})
    if len(rows) != len(batch) or len(counts) != 1 or not len(rows[0]):
        raise ConfigError(
            f"rows for {len(rows)} samples, with {counts} positions: expected rows for {len(batch)} samples, with the"
            " same number of positions, at least 1"
        )
    positions = torch.tensor([[row + length if row < 0 else row for row in sample_rows] for sample_rows in rows])
    outside = (positions < 0) | (positions >= length)
    if outside.any():
        raise ConfigError(
            f"row {int(positions[outside][0])} is outside the sequence: expected {-length} to {length - 1}"
        )
    padding = mask.gather(1, positions) == 0
    if padding.any():
        raise ConfigError(f"row {int(positions[padding][0])} is padding: expected positions of the prompt")
    return positions


@contextmanager
def attention_implementation(mllm: MLLM, name: str) -> Iterator[None]:
    """Use another attention function in the language model within a `with` block.

    Args:
        name: under which the function is registered with transformers.

    Raises:
        ModelError: the model cannot run with sdpa.
    """
    text = mllm.config.get_text_config()
    key = next(key for key in mllm.config.sub_configs if getattr(mllm.config, key) is text)
    before = text._attn_implementation
    try:
        mllm.model.set_attn_implementation({key: name})
    except ValueError as error:
        raise ModelError(f"{mllm.name} cannot run with sdpa, so its attention rows cannot be read ({error})") from error
    try:
        yield
    finally:
        mllm.model.set_attn_implementation({key: before})
