"""Attention of packed questions without padding: every question reads the shared prefix and itself.

A batch of packed images (b, s) runs as one sequence (1, N) of its N real tokens: the linear layers see no padding, and
the attention scores of two questions, which must not see one another, are never computed. The result is that of the
padded batch with a block-diagonal mask, up to rounding.
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
# questions of one image that are computed as one row: fewer copy its prefix more often, more are filled up with nothing
TOGETHER = 4


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch of packed images are in one sequence without padding.

    Attributes:
        real: which positions of the padded batch are tokens.
        prefix: the tokens before the questions, image by image; shorter prefixes are filled up with token 0.
        in_prefix: which entries of `prefix` are no filling.
        questions: the tokens of each question, filled up with token 0; every row holds up to `TOGETHER` questions of
            one image.
        image: for each row of `questions`, its row in `prefix`.
        place: for each token its row in `prefix` and `questions`, flattened and joined.
    """

    real: Bool[Tensor, "b s"]
    prefix: Int[Tensor, "b p"]
    in_prefix: Bool[Tensor, "b p"]
    questions: Int[Tensor, "r q l"]
    image: Int[Tensor, " r"]
    place: Int[Tensor, " n"]

    @classmethod
    def of(cls, segments: Int[Tensor, "b s"]) -> Packing:
        """Read the layout off `segments`: 0 for the prefix, q for question q, -1 for padding, in this order."""
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
        per_image = (segments.clamp_min(0).amax(1) + TOGETHER - 1) // TOGETHER
        image = torch.arange(len(segments), device=segments.device).repeat_interleave(per_image)
        row, slot = (per_image.cumsum(0) - per_image)[rows] + question // TOGETHER, question % TOGETHER
        questions = torch.zeros(len(image), TOGETHER, longest, dtype=torch.long, device=segments.device)
        questions[row, slot, offset] = number[rows, columns]

        place = torch.empty(int(real.sum()), dtype=torch.long, device=segments.device)
        place[prefix[in_prefix]] = in_prefix.flatten().nonzero().flatten()
        place[number[rows, columns]] = prefix.numel() + (row * TOGETHER + slot) * longest + offset
        return cls(real, prefix, in_prefix, questions, image, place)

    def flat(self, values: Tensor) -> Tensor:
        """(b, s, ...) of the padded batch as (1, N, ...)."""
        return values[self.real][None]

    def padded(self, values: Tensor, fill: float = 0) -> Tensor:
        """(1, N, ...) as (b, s, ...), with `fill` where there is padding."""
        result = values.new_full((*self.real.shape, *values.shape[2:]), fill)
        result[self.real] = values[0]
        return result


def use_packed_attention(model: Any) -> None:
    """Let the language model of `model` take a `Packing` as the argument `packing`; without one it attends as ever.

    Raises:
        ConfigError: a language model with blocks that do not see all that came before.
    """
    text: PretrainedConfig = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(
            f"the language model has {', '.join(sorted(kinds))}: expected full attention in every block, since"
            " questions are packed"
        )
    model.set_attn_implementation({"text_config": NAME})


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n d"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "b n h d"], None]:
    """Attention under the block-diagonal mask of `packing`, in transformers' interface; without `packing` transformers'
    own sdpa.

    A token of a question has a softmax over the prefix and the tokens of its question up to itself; one of the prefix
    over those before it.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    (images, before), (groups, together, longest) = packing.prefix.shape, packing.questions.shape
    heads, width = query.shape[1], query.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    order = torch.cat([packing.prefix.flatten(), packing.questions.flatten()])

    def parts(values: Tensor) -> tuple[Float[Tensor, "b h p d"], Float[Tensor, "b h ql d"]]:
        rows = values[0].transpose(0, 1).flatten(1).index_select(0, order).view(len(order), values.shape[1], width)
        if rows.shape[1] < heads:
            rows = rows.repeat_interleave(heads // rows.shape[1], dim=1)
        prefix, questions = rows.split([images * before, groups * together * longest])
        return prefix.view(images, before, heads, width).transpose(1, 2), questions.view(
            groups, together * longest, heads, width
        ).transpose(1, 2)

    def by_question(values: Float[Tensor, "b h ql d"]) -> Float[Tensor, "b h q l d"]:
        return values.unflatten(2, (together, longest))

    (query_0, query_q), (key_0, key_q), (value_0, value_q) = parts(query), parts(key), parts(value)
    p = dropout if module.training else 0.0
    output_0 = nn.functional.scaled_dot_product_attention(
        query_0, key_0, value_0, is_causal=True, scale=scale, dropout_p=p
    )
    query_q = query_q * scale
    to_prefix = query_q @ key_0.index_select(0, packing.image).transpose(-1, -2)
    if not packing.in_prefix.all():
        to_prefix = to_prefix.masked_fill(~packing.in_prefix[packing.image, None, None], -torch.inf)
    later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
    to_question = (by_question(query_q) @ by_question(key_q).transpose(-1, -2)).masked_fill(later, -torch.inf)
    scores = torch.cat([by_question(to_prefix), to_question], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if p:
        weights = nn.functional.dropout(weights, p)
    on_prefix, on_question = weights.split([before, longest], dim=-1)
    output_q = on_prefix.flatten(2, 3) @ value_0.index_select(0, packing.image) + (
        on_question @ by_question(value_q)
    ).flatten(2, 3)
    rows = torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (output_0, output_q)])
    return rows.index_select(0, packing.place).view(1, len(packing.place), heads, width), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
