"""A multimodal model with its alignment head: both losses in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainer import distributed
from trainer.alignment import Alignment, mean_loss
from trainer.setups.packing import Packing, use_packed_attention
from workbench.capture.hidden_states import encoder_rows, one_row_per_token
from workbench.mllm import MLLM, VisualTokens
from workbench.mllm.conversation import IGNORED
from workbench.mllm.residual import Residual


@dataclass
class AlignedOutput:
    """Losses of one forward pass, with the logits."""

    lm_loss: Tensor
    alignment_loss: Tensor | None
    logits: Tensor
    alignment_losses: dict[str, Tensor] = field(default_factory=dict)
    """Of each layer and target; `alignment_loss` is their mean."""


class Aligned(nn.Module):
    """A transformers model as it is, its alignment heads and its residual, called as one module so that DDP, FSDP and
    ZeRO see all of them.

    Args:
        base: the transformers model.
        alignment: attached to the model; None for the baseline, which then has no head at all.
        residual: attached to the model.
    """

    base: PreTrainedModel

    def __init__(self, base: PreTrainedModel, alignment: Alignment | None, residual: Residual | None) -> None:
        super().__init__()
        self.base, self.config, self.alignment, self.residual = base, base.config, alignment, residual
        blocks = {type(part).__name__ for part in base.modules()}
        self._no_split_modules = sorted(blocks & set(base._no_split_modules or ()))  # what FSDP divides one by one


class AlignedForConditionalGeneration(Aligned):
    """A toy LLaVA that learns from packed questions; its vision encoder stays frozen.

    Args:
        to_projector: the target is what the connector gives, instead of features that come with the batch.
    """

    base: LlavaForConditionalGeneration

    def __init__(
        self,
        llava: LlavaForConditionalGeneration,
        alignment: Alignment | None = None,
        residual: Residual | None = None,
        *,
        to_projector: bool = False,
    ) -> None:
        super().__init__(llava, alignment, residual)
        self.to_projector = to_projector
        use_packed_attention(llava)

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        labels: Int[Tensor, "b s"],
        position_ids: Int[Tensor, "b s"],
        segments: Int[Tensor, "b s"],
        connector_inputs: Float[Tensor, "b token d"],
        targets: dict[str, Float[Tensor, "b token dim"]] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> AlignedOutput:
        """Language-model loss over the answers, and the alignment loss of the visual tokens.

        Args:
            labels: the token to predict *at* each position (already shifted), -100 where nothing is learnt.
            segments: 0 for the shared image prefix, q for question q, -1 for padding; questions do not see one another.
            targets: features by name; without them, and without `to_projector`, there is no alignment loss.
            num_items_in_batch: answer tokens of the whole accumulated batch, by which the loss is normalised.
        """
        packing = Packing.of(segments)
        ids, answers = packing.flat(input_ids), packing.flat(labels)
        projected = self.base.model.multi_modal_projector(connector_inputs)
        image = BaseModelOutputWithPooling(pooler_output=list(projected))  # type: ignore[arg-type]
        logits = self.base(
            input_ids=ids,
            # no mask is made; what a token sees is in `packing`
            attention_mask=ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=packing.flat(position_ids),
            mm_encoder_outputs={"image": image},
            use_cache=False,
            packing=packing,
        ).logits
        wanted = answers != IGNORED
        losses = nn.functional.cross_entropy(logits[wanted].float(), answers[wanted], reduction="sum")
        lm_loss = losses / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.to_projector:
            targets = {"projector": projected.detach()}
        if self.alignment is None or targets is None:
            return AlignedOutput(lm_loss, None, packing.padded(logits))
        tokens = (ids[0] == self.config.image_token_id).nonzero().flatten()
        visual = [VisualTokens(index, None, (0.0, 0.0, 1.0, 1.0)) for index in tokens.view(len(projected), -1)]
        parts = self.alignment.losses(targets, [visual])
        return AlignedOutput(lm_loss, mean_loss(parts), packing.padded(logits), parts)


class AlignedMLLMForConditionalGeneration(Aligned):
    """Any multimodal model that learns from conversations.

    Args:
        target: `vfm` for features that come with the batch; `encoder` for what the connector receives, `projector` for
            what the first block does.
    """

    def __init__(
        self, mllm: MLLM, alignment: Alignment | None = None, residual: Residual | None = None, *, target: str = "vfm"
    ) -> None:
        super().__init__(mllm.model, alignment, residual)
        self.target, self._mllm = target, mllm
        self._tower: Tensor | None = None
        self._first: Tensor | None = None
        if alignment is not None and target == "encoder":
            mllm.projector.register_forward_pre_hook(self._keep_tower)
        if alignment is not None and target == "projector":
            mllm.decoder.layers[0].register_forward_pre_hook(self._keep_first, with_kwargs=True)

    def _keep_tower(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._tower = args[0].detach()

    def _keep_first(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if self._first is None:  # what activation checkpointing computes again is not kept
            self._first = (args[0] if args else kwargs["hidden_states"]).detach()

    def forward(
        self,
        labels: Int[Tensor, "b s"],
        visual: Sequence[Sequence[VisualTokens]],
        targets: dict[str, Any] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        aligned: int = 0,
        **inputs: Any,
    ) -> AlignedOutput:
        """Language-model loss over the answers, and the alignment loss of the visual tokens.

        Args:
            labels: the tokens to learn, in place; -100 elsewhere.
            visual: where the visual tokens of each conversation are; conversations without an image have no alignment
                loss.
            targets: features by VFM; without them, as in evaluation, only the model's own features can be targets, and
                only in training.
            num_items_in_batch: answer tokens of the whole accumulated batch, by which the loss is normalised.
            aligned: what the Collator counted, for the trainer.
            inputs: of the model, as its processor gave them.
        """
        self._first = None
        logits = self.base(**inputs, use_cache=False).logits
        wanted = labels[:, 1:] != IGNORED
        losses = nn.functional.cross_entropy(logits[:, :-1][wanted].float(), labels[:, 1:][wanted], reduction="sum")
        count = (
            wanted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=losses.device)
        )
        lm_loss = losses / count.clamp(min=1)  # a cut may have left no answer
        if not self.training:
            return AlignedOutput(lm_loss, None, logits)
        lm_loss = lm_loss + self._nothing()
        if self.alignment is None or not any(map(len, visual)):
            return AlignedOutput(lm_loss, None, logits)
        if self.target != "vfm":
            targets = {self.target: self._own_target(visual)}
        assert targets is not None
        parts = self.alignment.losses(targets, visual)
        return AlignedOutput(lm_loss, mean_loss(parts), logits, parts)

    def _nothing(self) -> Tensor:
        """0, with a gradient of 0 for all that texts alone, or a tower whose last blocks are not read, do not reach.

        AdamW moves a parameter whose gradient is 0 and leaves one that has none; so it is 0 in any number of processes,
        and DDP finds a gradient of each. What ZeRO-3 has divided (`ds_id`) has no values here.
        """
        language = {id(p) for p in self._mllm.decoder.parameters()}
        rest = [
            distributed.own_part(p).sum()
            for p in self.parameters()
            if p.requires_grad and id(p) not in language and not hasattr(p, "ds_id")
        ]
        return 0.0 * torch.stack(rest).sum() if rest else torch.zeros(())

    def _own_target(self, visual: Sequence[Sequence[VisualTokens]]) -> list[Tensor]:
        """Features (token, d) of each conversation with an image."""
        if self.target == "encoder":
            assert self._tower is not None
            flat = one_row_per_token(self._mllm, self._tower)
            return [
                flat[rows.to(flat.device)]
                for rows in encoder_rows(self._mllm, [list(own) for own in visual])
                if len(rows)
            ]
        assert self._first is not None
        return [
            self._first[row, torch.cat([part.index for part in own]).to(self._first.device)]
            for row, own in enumerate(visual)
            if own
        ]
