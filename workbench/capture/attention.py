"""Attention of chosen query rows, its gradient, and rollout."""

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
    """All that one block's attention probabilities follow from."""

    query: Float[Tensor, "sample head key d"]
    key: Float[Tensor, "sample group key d"]
    mask: Tensor | None
    scaling: float | None
    causal: bool

    def rows(self, rows: Int[Tensor, "sample row"]) -> Float[Tensor, "sample head row key"]:
        """softmax(q k^T * scaling + mask) for these query rows in float32, heads that share a key side by side."""
        batch, heads, length, width = self.query.shape
        rows = rows.to(self.query.device)
        chosen = self.query.gather(2, rows[:, None, :, None].expand(batch, heads, rows.shape[1], width))
        grouped = chosen.unflatten(1, (self.key.shape[1], -1))
        scores = (
            ((grouped @ self.key[:, :, None].mT) * (width**-0.5 if self.scaling is None else self.scaling))
            .flatten(1, 2)
            .float()
        )
        if self.mask is not None:
            allowed = self.mask.expand(batch, -1, length, -1)[..., : self.key.shape[2]]
            allowed = allowed.gather(
                2, rows[:, None, :, None].expand(batch, allowed.shape[1], rows.shape[1], allowed.shape[3])
            )
            scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
        elif self.causal:
            scores = scores.masked_fill(
                torch.arange(self.key.shape[2], device=rows.device) > rows[:, None, :, None], -torch.inf
            )
        return scores.softmax(-1)


@dataclass
class _Rows:
    """Collects attention probabilities of the wanted query rows while the model runs."""

    rows: Int[Tensor, "sample row"]
    blocks: set[int]
    found: dict[int, Any] = field(default_factory=dict)
    copies: Copies = field(default_factory=Copies)

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        """Keep what is wanted of one block, and return the block's attention output."""
        rows = scores.rows(self.rows).to(scores.query.dtype)
        self.found[block] = self.copies.empty(rows.device, *rows.shape, dtype=rows.dtype)
        self.copies.start(rows, self.found[block])
        return output


class _Gradients(_Rows):
    """Computes the wanted rows' output from their probabilities, so that gradients reach these; each block keeps
    (probabilities, where gradients land)."""

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        rows = self.rows.to(output.device)
        probabilities = scores.rows(rows)
        leaf = torch.zeros_like(probabilities, requires_grad=True)
        self.found[block] = (probabilities.detach(), leaf)
        shared = value.repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)
        own = ((probabilities + leaf).to(value.dtype) @ shared).transpose(1, 2)
        return output.scatter(1, rows[:, :, None, None].expand_as(own), own)


class _Whole(_Rows):
    """Keeps the queries and keys of every block."""

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        self.found[block] = scores
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
    """sdpa, which never forms the S x S matrix, and beside it the few rows of that matrix that were asked for."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(
            "this model's attention has more than a softmax of scores (softcap or sinks): its rows cannot be read"
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
    """Attention probabilities of chosen query positions, block by block, from one forward pass; the S x S matrix is
    never formed.

    Args:
        rows: positions in `input_ids` for each sample, the same number for all; negative ones count from the end.
        layers: blocks 1 to L, all by default; the result comes in their order.

    Raises:
        ConfigError: a layer or position that does not exist, or a position of padding.
        ModelError: the model caps its attention scores, which sdpa cannot do.
    """
    wanted = check_layers(mllm, layers, first=1)
    collector = _Rows(_positions(batch, rows), set(wanted))
    with torch.inference_mode():
        _collect(mllm, batch, collector, keep=1)
    return (collector.found.pop(layer) for layer in wanted)


def gradient_attention(
    mllm: MLLM, batch: Batch, *, rows: Sequence[int], layers: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "sample head key"]]:
    """Attention probabilities of one query position of each sample, times the gradient of the logit of the token that
    the model predicts there.

    Block by block, with its sign: a positive value says that more attention to that key would raise the logit, to first
    order. Only the gradient of the chosen row is formed (other rows of the same block count as fixed). Chefer et al.
    2021 (eq. 5) take the positive part and the mean over heads.

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
            score = logits[torch.arange(len(batch)), index].float().amax(-1).sum()  # samples do not touch one another
            gradients = torch.autograd.grad(score, [collector.found[layer][1] for layer in wanted])
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return ((collector.found.pop(layer)[0] * own)[:, :, 0].cpu() for layer, own in zip(wanted, gradients, strict=True))


def rollout(mllm: MLLM, batch: Batch, *, rows: Sequence[int], chunk: int = 256) -> Float[Tensor, "sample key"]:
    """Attention rollout (Abnar and Zuidema 2020) of one query position of each sample to all positions of the prompt;
    rows sum to 1.

    The product over blocks of (A + I) / 2, A the mean over heads. It is taken from the last block down, one row of it
    at a time, so that no more than `chunk` rows of an attention matrix exist at once. It sees neither values nor the
    MLPs.

    Raises:
        ConfigError, ModelError: as `attention`.
    """
    wanted = check_layers(mllm, None, first=1)
    collector = _Whole(_positions(batch, [[row] for row in rows]), set(wanted))
    with torch.inference_mode():
        _collect(mllm, batch, collector, keep=1)
        length = batch.inputs["input_ids"].shape[1]
        flow = torch.zeros(len(batch), length, device=mllm.device).scatter_(1, collector.rows.to(mllm.device), 1.0)
        for block in reversed(wanted):
            scores, moved = collector.found.pop(block), torch.zeros_like(flow)
            for part in torch.arange(length).split(chunk):
                # rows of padding see nothing, and nothing flows to them
                mean = scores.rows(part.expand(len(batch), -1)).mean(1).nan_to_num()
                moved += (flow[:, None, part] @ mean)[:, 0]
            flow = (flow + moved) / 2
    return flow.cpu()


def _collect(mllm: MLLM, batch: Batch, collector: _Rows, *, keep: int | Tensor) -> Tensor:
    """Run the model with `collector` in its attention and return the logits of the positions to keep."""
    check_uncapped(mllm)
    with mllm.lock, attention_implementation(mllm, ROWS):
        logits = mllm.model(**batch.inputs, use_cache=False, logits_to_keep=keep, collect_rows=collector).logits
        collector.copies.finish()
    missing = collector.blocks - set(collector.found)
    if missing:
        raise ModelError(f"{mllm.name}: blocks {sorted(missing)} have no attention of the usual kind to read")
    return logits


def check_uncapped(mllm: MLLM) -> None:
    """sdpa, which reading and knockout go through, cannot cap attention scores."""
    cap = getattr(mllm.config.get_text_config(), "attn_logit_softcapping", None)
    if cap:
        raise ModelError(
            f"{mllm.name} caps its attention scores (attn_logit_softcapping {cap}): its attention cannot be read or"
            " knocked out row by row"
        )


def _positions(batch: Batch, rows: Sequence[Sequence[int]]) -> Int[Tensor, "sample row"]:
    mask = batch.inputs["attention_mask"].cpu()
    length = mask.shape[1]
    if len(rows) != len(batch) or len({len(own) for own in rows}) != 1 or not len(rows[0]):
        raise ConfigError(
            f"rows for {len(rows)} samples of {sorted({len(own) for own in rows})} positions: expected {len(batch)} of"
            " one length, at least 1"
        )
    positions = torch.tensor([[row + length if row < 0 else row for row in own] for own in rows])
    outside = (positions < 0) | (positions >= length)
    if outside.any():
        raise ConfigError(
            f"row {int(positions[outside][0])} is outside the sequence: expected {-length} to {length - 1}"
        )
    if not mask.gather(1, positions).all():
        raise ConfigError(
            f"row {int(positions[mask.gather(1, positions) == 0][0])} is padding: expected positions of the prompt"
        )
    return positions


@contextmanager
def attention_implementation(mllm: MLLM, name: str) -> Iterator[None]:
    """Use another attention function in the language model for a while."""
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
