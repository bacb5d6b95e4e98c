"""Changing visual tokens at one place on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capture.hidden_states import check_layers, encoder_rows, one_row_per_token, positions_of
from workbench.errors import ConfigError, ModelError
from workbench.mllm.base import MLLM, positions_to_keep
from workbench.mllm.family import Batch

Site = Literal["encoder", "projector"] | int


Edit = Callable[[Float[Tensor, "token d"], int], Float[Tensor, "token d"]]


def check_site(mllm: MLLM, at: Site) -> Literal["encoder"] | int:
    """Return "encoder" or the layer number of a place where visual tokens can be changed.

    Raises:
        ConfigError: no such place.
        ModelError: encoder features are added again after it, so that a change would be half undone.
    """
    layer = 0 if at == "projector" else at
    if isinstance(layer, int):
        check_layers(mllm, [layer])
    elif layer != "encoder":
        raise ConfigError(
            f"place '{at}' does not exist: expected 'encoder', 'projector' or a layer from 0 to {mllm.n_layers}"
        )
    injected = mllm.family.injected_blocks(mllm.config)
    if injected and (not isinstance(layer, int) or layer <= injected):
        raise ModelError(
            f"{mllm.family.name} adds encoder features to the outputs of its first {injected} blocks, so an edit at"
            f" '{at}' is half undone: expected a layer from {injected + 1} to {mllm.n_layers}"
        )
    return layer


def edit(mllm: MLLM, batch: Batch, *, at: Site, fn: Edit, keep: int = 1) -> Float[Tensor, "sample position vocab"]:
    """Logits of each sample's last `keep` tokens when the visual tokens are changed at one place on their way.

    Args:
        at: "encoder" for what the connector receives, "projector" for what it gives (layer 0), or layer l: the output
            of block l.
        fn: (visual tokens of one sample, its number in the batch) -> their replacement, of the same shape.
        keep: how many tokens of the prompt, in its order; padding is none, on whichever side it is.

    Raises:
        ConfigError: no such place, or a prompt of fewer than `keep` tokens.
        ModelError: encoder features are added again after that place, so that the edit would be half undone; or `fn`
            changed the shape.
    """
    layer = check_site(mllm, at)
    mask = batch.inputs["attention_mask"]
    if not 1 <= keep <= int(mask.sum(1).min()):
        raise ConfigError(f"keep is {keep}: expected 1 to {int(mask.sum(1).min())}, the tokens of the shortest prompt")
    found = mllm.visual_tokens(batch)
    rows = encoder_rows(mllm, found) if layer == "encoder" else []
    index = positions_of(found)
    if not any(len(own) for own in index):
        raise ModelError("no sample of the batch has an image: expected visual tokens to edit")

    def change(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        if layer == "encoder":
            flat = one_row_per_token(mllm, changed)
            for sample, own in enumerate(rows):
                if len(own):
                    flat[own] = apply_edit(fn, flat[own], sample)
            return flat.view(hidden.shape)
        for sample, own in enumerate(index):
            if len(own):
                changed[sample, own] = apply_edit(fn, changed[sample, own], sample)
        return changed

    with mllm.lock:
        logits = _trace(mllm, batch, layer, change, positions_to_keep(batch) + keep - 1)
    last = logits.shape[1] - 1 - mask.flip(1).long().argmax(1)
    positions = last[:, None] - torch.arange(keep - 1, -1, -1, device=mask.device)
    return logits[torch.arange(len(mask), device=mask.device)[:, None], positions].float().cpu()


def apply_edit(fn: Edit, values: Float[Tensor, "token d"], sample: int) -> Float[Tensor, "token d"]:
    """What `fn` makes of a copy of `values`.

    Raises:
        ModelError: another shape.
    """
    new = fn(values.clone(), sample)
    if new.shape != values.shape:
        raise ModelError(f"an edit returned visual tokens of shape {tuple(new.shape)}: expected {tuple(values.shape)}")
    return new.to(values)


def _trace(mllm: MLLM, batch: Batch, layer: int | str, change: Callable[[Tensor], Tensor], keep: int) -> Tensor:
    """One traced forward pass with the change in place; the caller holds the model's lock, because traces of one model
    must not overlap."""
    import nnsight  # which only edits need

    # wrapping changes a model for good, so it is done once for each, and goes when the model goes
    own = vars(mllm.model)
    traced = own.get("_traced") or own.setdefault("_traced", nnsight.NNsight(mllm.model))
    if layer == "encoder":
        module = traced.get(f"model.{mllm.family.projector}")
    else:
        blocks = next(name for name, part in mllm.model.named_modules() if part is mllm.decoder.layers)
        module = traced.get(f"{blocks}.{max(0, int(layer) - 1)}")
    before = layer in ("encoder", 0)
    with torch.no_grad(), traced.trace(**batch.inputs, use_cache=False, logits_to_keep=keep):
        if before:
            module.input = change(module.input)
        else:
            module.output = change(module.output)
        logits = nnsight.save(traced.output.logits)
    return logits
