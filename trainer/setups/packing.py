"""Attention for packed questions, without padding: each question attends to the shared prefix and to itself.

A batch of packed images (b, s) runs as one sequence (1, N) of its N tokens. The linear layers thus compute no padding,
and scores between two questions, which must not attend to one another, are never computed. The result equals that of
the padded batch with a block-diagonal mask, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workbench.errors import ConfigError

NAME = "packed_questions"
# Questions of one image that are computed together, as one row. With fewer, the image's prefix is copied more often;
# with more, more of the rows is padding.
QUESTIONS_PER_ROW = 4


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch of packed images are in one sequence without padding.

    Tokens are numbered by their position in that sequence, from 0 to n - 1.

    Attributes:
        real: which positions of the padded batch are tokens, not padding.
        prefix: numbers of the tokens before the questions, one row per image; shorter rows are padded with 0.
        in_prefix: which entries of `prefix` are tokens, not padding.
        questions: numbers of the tokens of each question (row, question, token), padded with 0; a row has up to
            `QUESTIONS_PER_ROW` questions of one image.
        image: for each row of `questions`, the row of `prefix` that belongs to it.
        place: for each token, its index in `prefix` and `questions` flattened and concatenated.
    """

    real: Bool[Tensor, "b s"]
    prefix: Int[Tensor, "b p"]
    in_prefix: Bool[Tensor, "b p"]
    questions: Int[Tensor, "r q l"]
    image: Int[Tensor, " r"]
    place: Int[Tensor, " n"]

    @classmethod
    def of(cls, segments: Int[Tensor, "b s"]) -> Packing:
        """Return the layout of a batch; its `segments` are 0 in the prefix, q in question q, -1 in padding."""
        real = segments >= 0
        number = (real.flatten().cumsum(0) - 1).view_as(segments)
        in_prefix = segments == 0
        in_prefix = in_prefix[:, : int(in_prefix.sum(1).max())]
        prefix = number[:, : in_prefix.shape[1]].where(in_prefix, 0)

        rows, columns = (segments > 0).nonzero(as_tuple=True)
        question = segments[rows, columns] - 1
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[1:] = (rows[1:] != rows[:-1]) | (question[1:] != question[:-1])
        offset = columns - columns[begins][begins.cumsum(0) - 1]
        longest = int(offset.max()) + 1 if len(rows) else 0
        rows_of_image = (segments.clamp_min(0).amax(1) + QUESTIONS_PER_ROW - 1) // QUESTIONS_PER_ROW
        image = torch.arange(len(segments), device=segments.device).repeat_interleave(rows_of_image)
        row = (rows_of_image.cumsum(0) - rows_of_image)[rows] + question // QUESTIONS_PER_ROW
        slot = question % QUESTIONS_PER_ROW
        questions = torch.zeros(len(image), QUESTIONS_PER_ROW, longest, dtype=torch.long, device=segments.device)
        questions[row, slot, offset] = number[rows, columns]

        place = torch.empty(int(real.sum()), dtype=torch.long, device=segments.device)
        place[prefix[in_prefix]] = in_prefix.flatten().nonzero().flatten()
        place[number[rows, columns]] = prefix.numel() + (row * QUESTIONS_PER_ROW + slot) * longest + offset
        return cls(real, prefix, in_prefix, questions, image, place)

    def flat(self, values: Tensor) -> Tensor:
        """Return `values` (b, s, ...) of the padded batch as one sequence without padding (1, N, ...)."""
        return values[self.real][None]


def use_packed_attention(model: Any) -> None:
    """Make the language model of `model` accept a `Packing` as the argument `packing` of its forward.

    Without that argument its attention is the usual one.

    Raises:
        ConfigError: some block does not attend to all tokens before it, or caps its scores.
    """
    text: PretrainedConfig = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    softcapping = getattr(text, "attn_logit_softcapping", None)
    if kinds != {"full_attention"} or softcapping:
        attention = ", ".join(sorted(kinds)) + (f" with attn_logit_softcapping {softcapping}" if softcapping else "")
        raise ConfigError(
            f"the language model has {attention}: expected full attention in every block, without softcapping, since"
            " questions are packed"
        )
    model.set_attn_implementation({"text_config": NAME})


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m d"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b n h d"], None]:
    """Compute attention under the block-diagonal mask of `packing`, with the interface that transformers expects.

    A token of a question attends to the prefix and to its question up to itself; a token of the prefix attends to the
    prefix up to itself, and m is n. Without `packing` this is transformers' own sdpa attention.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    (images, prefix_length), (rows, per_row, longest) = packing.prefix.shape, packing.questions.shape
    heads, width = query.shape[1], query.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    order = torch.cat([packing.prefix.flatten(), packing.questions.flatten()])

    def split(values: Tensor) -> tuple[Float[Tensor, "b h p d"], Float[Tensor, "r h ql d"]]:
        """Return the values of the prefixes and those of the questions, the same number of heads for all."""
        tokens = values[0].transpose(0, 1).flatten(1).index_select(0, order).view(len(order), values.shape[1], width)
        if tokens.shape[1] < heads:  # grouped-query attention
            tokens = tokens.repeat_interleave(heads // tokens.shape[1], dim=1)
        prefix, questions = tokens.split([images * prefix_length, rows * per_row * longest])
        prefix = prefix.view(images, prefix_length, heads, width).transpose(1, 2)
        questions = questions.view(rows, per_row * longest, heads, width).transpose(1, 2)
        return prefix, questions

    def by_question(values: Float[Tensor, "r h ql d"]) -> Float[Tensor, "r h q l d"]:
        return values.unflatten(2, (per_row, longest))

    (query_p, query_q), (key_p, key_q), (value_p, value_q) = split(query), split(key), split(value)
    dropout_p = dropout if module.training else 0.0
    output_p = nn.functional.scaled_dot_product_attention(
        query_p, key_p, value_p, is_causal=True, scale=scale, dropout_p=dropout_p
    )
    query_q = query_q * scale
    prefix_scores = query_q @ key_p.index_select(0, packing.image).transpose(-1, -2)
    if not packing.in_prefix.all():
        prefix_scores = prefix_scores.masked_fill(~packing.in_prefix[packing.image, None, None], -torch.inf)
    later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
    question_scores = (by_question(query_q) @ by_question(key_q).transpose(-1, -2)).masked_fill(later, -torch.inf)
    scores = torch.cat([by_question(prefix_scores), question_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if dropout_p:
        weights = nn.functional.dropout(weights, dropout_p)
    prefix_weights, question_weights = weights.split([prefix_length, longest], dim=-1)
    from_prefix = prefix_weights.flatten(2, 3) @ value_p.index_select(0, packing.image)
    from_question = (question_weights @ by_question(value_q)).flatten(2, 3)
    output_q = from_prefix + from_question
    outputs = torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (output_p, output_q)])
    return outputs.index_select(0, packing.place).view(1, len(packing.place), heads, width), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
