"""A multimodal model with its alignment heads: one forward pass computes both losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from trainer import distributed
from trainer.alignment import Alignment
from trainer.masking import TokenMask
from trainer.objectives import mean_loss
from trainer.setups.packing import Packing, use_packed_attention
from workbench.capture.hidden_states import encoder_rows, one_row_per_token
from workbench.mllm import MLLM, VisualTokens
from workbench.mllm.conversation import IGNORED
from workbench.mllm.residual import Residual


@dataclass
class AlignedOutput:
    """Losses and logits of one forward pass.

    Attributes:
        lm_loss: cross-entropy over the answer tokens, divided by their number in the accumulated global batch.
        alignment_loss: mean of `alignment_losses`, not yet weighted by lambda; None where nothing is aligned.
        logits: predictions of the answer tokens (token, vocabulary), row by row of the batch.
        alignment_losses: loss of each layer and target, as {"layer_L/target": loss}.
    """

    lm_loss: Tensor
    alignment_loss: Tensor | None
    logits: Float[Tensor, "n vocabulary"]
    alignment_losses: dict[str, Tensor] = field(default_factory=dict)


class Aligned(nn.Module):
    """An unchanged transformers model with its alignment heads and residual: one module for DDP, FSDP and ZeRO.

    Args:
        base: the transformers model.
        alignment: what `attach_alignment` returned for it; None for the baseline, which has no head at all.
        residual: what `attach_residual` returned for it; None without a residual.
        mask: what `attach_mask` returned for it; None where no visual token is hidden.
    """

    base: PreTrainedModel

    def __init__(
        self,
        base: PreTrainedModel,
        alignment: Alignment | None,
        residual: Residual | None,
        mask: TokenMask | None = None,
    ) -> None:
        super().__init__()
        self.base, self.config, self.alignment, self.residual = base, base.config, alignment, residual
        self.mask = mask
        class_names = {type(part).__name__ for part in base.modules()}
        # FSDP shards the modules of these classes one by one
        self._no_split_modules = sorted(class_names & set(base._no_split_modules or ()))

    def hidden_tokens(self, visual: Sequence[Sequence[VisualTokens]]) -> Bool[Tensor, " token"] | None:
        """Draw the visual tokens that the next forward pass hides; None where it hides none, as in evaluation."""
        return self.mask.draw(visual) if self.mask is not None and self.training else None


class AlignedForConditionalGeneration(Aligned):
    """A toy LLaVA that is trained on packed questions; its vision encoder stays frozen.

    Args:
        to_projector: align with the projector's output (without gradient), instead of features from the batch.
    """

    base: LlavaForConditionalGeneration

    def __init__(
        self,
        llava: LlavaForConditionalGeneration,
        alignment: Alignment | None = None,
        residual: Residual | None = None,
        *,
        to_projector: bool = False,
        mask: TokenMask | None = None,
    ) -> None:
        super().__init__(llava, alignment, residual, mask)
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
        """Return the language-model loss over the answers, and the alignment loss of the visual tokens.

        Args:
            labels: the token to predict *at* each position (already shifted), -100 where nothing is to be predicted.
            segments: 0 for the shared image prefix, q for question q, -1 for padding; questions do not see one another.
            connector_inputs: features of the vision encoder, which the projector receives.
            targets: features by name; without them, and without `to_projector`, there is no alignment loss.
            num_items_in_batch: answer tokens of the whole accumulated batch, by which the loss is divided; by default
                those of this batch.
        """
        packing = Packing.of(segments)
        ids, (answers,) = packing.flat(input_ids), packing.flat(labels)
        places = (answers != IGNORED).nonzero().flatten()
        projected = self.base.model.multi_modal_projector(connector_inputs)
        visual: list[VisualTokens] = []
        if self.alignment is not None:  # finding them on a GPU makes the host wait
            positions = (ids[0] == self.config.image_token_id).nonzero().flatten()
            visual = [VisualTokens(index, None, (0.0, 0.0, 1.0, 1.0)) for index in positions.view(len(projected), -1)]
        hidden = self.hidden_tokens([visual])
        if self.residual is not None:
            self.residual.expect(ids == self.config.image_token_id)
        logits = self.base(
            inputs_embeds=self._embedded(ids, projected),
            # a placeholder, so that transformers makes no mask: `packing` defines what each token sees
            attention_mask=ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=packing.flat(position_ids),
            use_cache=False,
            packing=packing,
            logits_to_keep=places,  # at all positions, SmolLM2's step takes x1.14 (`benchmarks.trainer --smol`)
        ).logits[0]
        total = nn.functional.cross_entropy(logits.float(), answers[places], reduction="sum")
        lm_loss = total / (len(places) if num_items_in_batch is None else num_items_in_batch)
        if self.to_projector:
            targets = {"projector": projected.detach()}
        if self.alignment is None or targets is None:
            return AlignedOutput(lm_loss, None, logits)
        alignment_losses = self.alignment.losses(targets, [visual], hidden)
        return AlignedOutput(lm_loss, mean_loss(alignment_losses), logits, alignment_losses)

    def _embedded(self, ids: Int[Tensor, "1 n"], projected: Float[Tensor, "b token d"]) -> Float[Tensor, "1 n d"]:
        """Return the embeddings of the tokens, with the projected features at the visual positions.

        They are put in here, since versions of transformers before `mm_encoder_outputs` ignore that argument, and
        would train a model that sees no image.
        """
        embedded = self.base.get_input_embeddings()(ids)
        visual = (ids == self.config.image_token_id)[..., None].expand_as(embedded)
        return embedded.masked_scatter(visual, projected.to(embedded.dtype))


def answer_positions(labels: Int[Tensor, "b s"]) -> Int[Tensor, " n"]:
    """Return the positions, in a flattened batch, whose next token is an answer token."""
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns


class AlignedMLLMForConditionalGeneration(Aligned):
    """Any multimodal model that is trained on conversations.

    Args:
        mllm: the loaded model.
        target: what the visual tokens are aligned with: `vfm` for features that come with the batch, `encoder` for the
            input of the model's own projector, `projector` for its output, as the first block receives it.
    """

    def __init__(
        self,
        mllm: MLLM,
        alignment: Alignment | None = None,
        residual: Residual | None = None,
        *,
        target: str = "vfm",
        mask: TokenMask | None = None,
    ) -> None:
        super().__init__(mllm.model, alignment, residual, mask)
        self.target, self._mllm = target, mllm
        self._projector_input: Tensor | None = None
        self._first_block_input: Tensor | None = None
        if alignment is not None and target == "encoder":
            mllm.projector.register_forward_pre_hook(self._record_projector_input)
        if alignment is not None and target == "projector":
            mllm.decoder.layers[0].register_forward_pre_hook(self._record_first_block_input, with_kwargs=True)

    def _record_projector_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._projector_input = args[0].detach()

    def _record_first_block_input(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if self._first_block_input is None:  # activation checkpointing runs the block again in the backward pass
            self._first_block_input = (args[0] if args else kwargs["hidden_states"]).detach()

    def forward(
        self,
        labels: Int[Tensor, "b s"],
        visual: Sequence[Sequence[VisualTokens]],
        targets: dict[str, Any] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        answers: Int[Tensor, " n"] | None = None,
        aligned: int = 0,
        **inputs: Any,
    ) -> AlignedOutput:
        """Return the language-model loss over the answers and, in training, the alignment loss of the visual tokens.

        Args:
            labels: the answer tokens at their own positions (not shifted), -100 elsewhere.
            visual: the visual tokens of each conversation; conversations without an image have no alignment loss.
            targets: features by VFM; not needed where the target is the model's own encoder or projector.
            num_items_in_batch: answer tokens of the whole accumulated batch, by which the loss is divided; by default
                those of this batch.
            answers: `answer_positions(labels)`, which the collator computes, since finding them on a GPU would make the
                host wait.
            aligned: a count that the collator stores in the batch for the trainer; unused here.
            inputs: further inputs of the transformers model, as its processor returned them.
        """
        self._first_block_input = None
        hidden = self.hidden_tokens(visual)
        if answers is None:
            answers = answer_positions(labels)
        logits = self.base(**inputs, use_cache=False).logits.flatten(0, 1)[answers]
        total = nn.functional.cross_entropy(logits.float(), labels.flatten()[answers + 1], reduction="sum")
        count = torch.as_tensor(len(answers) if num_items_in_batch is None else num_items_in_batch, device=total.device)
        lm_loss = total / count.clamp(min=1)  # max_length may have cut off every answer
        if not self.training:
            return AlignedOutput(lm_loss, None, logits)
        lm_loss = lm_loss + self._zero_with_gradients()
        if self.alignment is None or not any(map(len, visual)):
            return AlignedOutput(lm_loss, None, logits)
        if self.target != "vfm":
            targets = {self.target: self._target_from_model(visual)}
        assert targets is not None
        alignment_losses = self.alignment.losses(targets, visual, hidden)
        return AlignedOutput(lm_loss, mean_loss(alignment_losses), logits, alignment_losses)

    def _zero_with_gradients(self) -> Tensor:
        """Return 0, with a gradient of 0 for every trained parameter outside the language model.

        A batch of texts alone does not use the vision encoder, the projector and the heads, and some models do not use
        the last blocks of the vision encoder. Without this term such a parameter would have no gradient: DDP would wait
        for it, and AdamW would skip the parameter on one process and update it (weight decay, moments) on several. With
        it every number of processes takes the same step. Parameters that ZeRO-3 shards (`ds_id`) have no values here.
        """
        language = {id(p) for p in self._mllm.decoder.parameters()}
        sums = [
            distributed.local_part(p).sum()
            for p in self.parameters()
            if p.requires_grad and id(p) not in language and not hasattr(p, "ds_id")
        ]
        return 0.0 * torch.stack(sums).sum() if sums else torch.zeros(())

    def _target_from_model(self, visual: Sequence[Sequence[VisualTokens]]) -> list[Tensor]:
        """Return the input or output of the model's own projector, (token, d) for each conversation with an image."""
        if self.target == "encoder":
            assert self._projector_input is not None
            features = one_row_per_token(self._mllm, self._projector_input)
            rows_by_sample = encoder_rows(self._mllm, [list(parts) for parts in visual])
            return [features[rows.to(features.device, non_blocking=True)] for rows in rows_by_sample if len(rows)]
        states = self._first_block_input
        assert states is not None
        return [
            states[row, torch.cat([part.index for part in parts]).to(states.device, non_blocking=True)]
            for row, parts in enumerate(visual)
            if parts
        ]
