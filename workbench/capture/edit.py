"""Change visual tokens at one site: the vision encoder's features, the projector's output, or a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.capture.hidden_states import check_layers, encoder_rows, one_row_per_token, positions_of
from workbench.errors import ConfigError, ModelError
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch
from workbench.mllm.logits import logits_at_end, positions_to_keep

Site = Literal["encoder", "projector"] | int
"""Where visual tokens are changed: the projector's input, its output (layer 0), or layer l."""
Edit = Callable[[Float[Tensor, "token d"], int], Float[Tensor, "token d"]]
"""(visual tokens of one sample, number of the sample in the batch) -> their replacement, of the same shape."""


def check_site(mllm: MLLM, at: Site) -> Literal["encoder"] | int:
    """Return the site as "encoder" or as a layer number, if visual tokens can be changed there.

    Raises:
        ConfigError: no such site.
        ModelError: the family adds encoder features again after this site, which would partly undo the change.
    """
    layer = 0 if at == "projector" else at
    if isinstance(layer, int):
        check_layers(mllm, [layer])
    elif layer != "encoder":
        raise ConfigError(
            f"site '{at}' does not exist: expected 'encoder', 'projector' or a layer from 0 to {mllm.n_layers}"
        )
    injected = mllm.family.injected_blocks(mllm.config)
    if injected and (not isinstance(layer, int) or layer <= injected):
        raise ModelError(
            f"{mllm.family.name} adds encoder features to the outputs of its first {injected} blocks, which would"
            f" partly undo an edit at '{at}': expected a layer from {injected + 1} to {mllm.n_layers}"
        )
    return layer


def edit(mllm: MLLM, batch: Batch, *, at: Site, fn: Edit, keep: int = 1) -> Float[Tensor, "sample position vocab"]:
    """Return the logits of each sample's last `keep` tokens after the visual tokens were changed at one site.

    Args:
        at: "encoder" for the projector's input, "projector" for its output (layer 0), or l for the output of block l.
        fn: (visual tokens of one sample, number of the sample in the batch) -> their replacement, of the same shape.
        keep: for how many tokens at the end of each prompt; padding does not count, on whichever side it is.

    Raises:
        ConfigError: no such site, or a prompt of fewer than `keep` tokens.
        ModelError: the family adds encoder features again after that site, no sample has an image, or `fn` changed the
            shape.
    """
    layer = check_site(mllm, at)
    mask = batch.inputs["attention_mask"]
    shortest = int(mask.sum(1).min())
    if not 1 <= keep <= shortest:
        raise ConfigError(f"keep is {keep}: expected 1 to {shortest}, the number of tokens of the shortest prompt")
    change = _change_of(mllm, batch, layer, fn)
    with mllm.lock:
        logits = _trace(mllm, batch, layer, change, positions_to_keep(batch, keep))
    return logits_at_end(logits, batch, keep).cpu()


@contextmanager
def editing(mllm: MLLM, batch: Batch, *, at: Site, fn: Edit) -> Iterator[None]:
    """Change the visual tokens of `batch` at one site in the next forward pass within a `with` block.

    With `mllm.generate`, that is the pass over the prompt; the tokens that follow see what became of the changed ones.
    Arguments and errors are those of `edit`.
    """
    layer = check_site(mllm, at)
    change, done = _change_of(mllm, batch, layer, fn), False

    def once(hidden: Tensor) -> Tensor:
        nonlocal done
        hidden, done = (hidden if done else change(hidden)), True
        return hidden

    def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (once(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": once(kwargs["hidden_states"])}

    if layer == "encoder":
        handle = mllm.projector.register_forward_pre_hook(before, with_kwargs=True)
    elif layer == 0:
        handle = mllm.decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = mllm.decoder.layers[layer - 1].register_forward_hook(lambda _, __, output: once(output))
    try:
        yield
    finally:
        handle.remove()


def _change_of(mllm: MLLM, batch: Batch, layer: Literal["encoder"] | int, fn: Edit) -> Callable[[Tensor], Tensor]:
    """Return the function that replaces the visual tokens among the hidden states of a batch at a site.

    Raises:
        ModelError: no sample has an image.
    """
    visual = mllm.visual_tokens(batch)
    rows = encoder_rows(mllm, visual) if layer == "encoder" else []
    positions = positions_of(visual)
    if not any(len(index) for index in positions):
        raise ModelError("no sample of the batch has an image: expected visual tokens to edit")

    def change(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        if layer == "encoder":
            flat = one_row_per_token(mllm, changed)
            for sample, sample_rows in enumerate(rows):
                if len(sample_rows):
                    flat[sample_rows] = apply_edit(fn, flat[sample_rows], sample)
            return flat.view(hidden.shape)
        for sample, index in enumerate(positions):
            if len(index):
                changed[sample, index] = apply_edit(fn, changed[sample, index], sample)
        return changed

    return change


def apply_edit(fn: Edit, values: Float[Tensor, "token d"], sample: int) -> Float[Tensor, "token d"]:
    """Return the replacement that `fn` gives for a copy of `values`, in their dtype and on their device.

    Raises:
        ModelError: it has another shape.
    """
    new = fn(values.clone(), sample)
    if new.shape != values.shape:
        raise ModelError(f"an edit returned visual tokens of shape {tuple(new.shape)}: expected {tuple(values.shape)}")
    return new.to(values)


def _trace(mllm: MLLM, batch: Batch, layer: int | str, change: Callable[[Tensor], Tensor], keep: int) -> Tensor:
    """Return the logits of the last `keep` positions from one traced forward pass with the change.

    The caller holds the model's lock, because traces of one model must not overlap.
    """
    import nnsight  # slow to import, and needed for edits only

    # Wrapping cannot be undone, so it is done once per model, and stored with the model so that both go together.
    attributes = vars(mllm.model)
    traced = attributes.get("_traced") or attributes.setdefault("_traced", nnsight.NNsight(mllm.model))
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
    return logits  # noqa: RET504  # nnsight fills it in when the block ends
