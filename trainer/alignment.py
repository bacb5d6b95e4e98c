"""Visual representation alignment (VIRAL, arXiv 2509.07979): alignment heads, and hooks that read the visual tokens.

`attach_alignment` works on every model that `workbench.mllm` can load, without changing it. The trainer uses it, and
you can use it in a training loop of your own (docs/howto/own_loop.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.alignment_config import AlignmentConfig
from trainer.objectives import AlignmentHead, cosine_loss, mean_loss, predict_loss, relation_loss
from workbench.attention_heads import head_count, head_outputs, output_projection
from workbench.errors import ConfigError, DataError, ModelError, UnknownNameError
from workbench.mllm import MLLM, VisualTokens
from workbench.mllm.family import final_norm_of

Objective = Literal["cosine", "relation", "predict"]
Heads = Literal["each", "shared", "none"]
Where = Literal["output", "attention", "heads"]
Site = tuple[int, int | None]
"""A layer, and the number of an attention head of it from 0; None for the whole layer."""
Targets = Mapping[str, Tensor | Sequence[Any]]
Visual = Bool[Tensor, "b s"] | Sequence[Sequence[VisualTokens]]


class Alignment(nn.Module):
    """Alignment heads, with hooks that record the hidden states of the aligned layers; made by `attach_alignment`.

    The module contains only the heads, so `parameters()` returns what the optimizer needs in addition to the model's
    own parameters. Run one forward pass of the model, then call `loss(...)` once: it uses the hidden states of the
    latest pass and forgets them.

    Attributes:
        sites: what is aligned, in ascending order: layers or single attention heads.
        heads: the alignment heads, ordered by site, then by target; shared heads have one for each target.
    """

    def __init__(
        self, widths: Mapping[Site, int], dims: Mapping[str, int], objective: Objective, heads: Heads, hidden: int
    ) -> None:
        super().__init__()
        self.sites, self.dims, self.objective, self.sharing = tuple(widths), dict(dims), objective, heads
        self.layers = tuple(dict.fromkeys(layer for layer, _ in self.sites))
        head_widths = {"each": list(widths.values()), "shared": list(widths.values())[:1], "none": []}[heads]
        self.heads = nn.ModuleList(AlignmentHead(width, hidden, dim) for width in head_widths for dim in dims.values())
        self._head_counts: dict[int, int] = {}  # attention heads of each layer, where single ones are aligned
        self._handles: list[RemovableHandle] = []
        self._states: dict[int, Tensor] = {}  # hidden states of the latest pass, by layer
        self._running, self._with_gradient = False, False

    @property
    def names(self) -> list[str]:
        """The names of the losses: layer_L/TARGET for a layer, layer_L_head_H/TARGET for an attention head of it."""
        return [f"{site_name(site)}/{target}" for site in self.sites for target in self.dims]

    def losses(
        self, targets: Targets, visual: Visual, only: Bool[Tensor, " token"] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss of each site and target after a forward pass, unweighted, by their `names`.

        Args:
            targets: for each name of `dims`, the features of the visual tokens in the order of the batch: one tensor
                (..., dim) that is flattened to one row for each token, or tensors (token, dim), one for each image or
                tile, in lists nested to any depth.
            visual: the positions of the visual tokens: a mask (b, s) where each row has one image, or the return value
                of `mllm.visual_tokens(batch)`.
            only: which visual tokens, in the order of the batch, the loss is a mean over; by default all. Not for the
                objective `relation`, which compares all tokens of an image.

        Raises:
            ModelError: there was no forward pass since the last call, or it did not run all aligned layers.
            DataError: the targets have other names, widths or numbers of tokens than expected.
        """
        states, self._states = self._states, {}
        if not states:
            raise ModelError(
                "there is no alignment loss before a forward pass of the model: run one pass before each call of `loss`"
            )
        if set(states) != set(self.layers):
            missing = sorted(set(self.layers) - set(states))
            raise ModelError(
                f"the forward pass did not reach the hooks of layers {missing}: attach the alignment after the last"
                " change to the model's modules (such as LoRA)"
            )
        if set(targets) != set(self.dims):
            raise DataError(f"targets are {', '.join(targets) or '(none)'}: expected {', '.join(self.dims)}")
        (rows, columns), sizes = _token_positions(visual)
        flat = {name: _one_row_per_token(name, targets[name], dim, sum(sizes)) for name, dim in self.dims.items()}
        if only is not None:
            rows, columns = rows[only.to(rows.device)], columns[only.to(columns.device)]
            flat = {name: target[only.to(target.device)] for name, target in flat.items()}
        losses = []
        for i, (layer, head) in enumerate(self.sites):
            hidden = states[layer] if head is None else head_outputs(states[layer], self._head_counts[layer], head)
            index = (rows * hidden.shape[1] + columns).to(hidden.device, non_blocking=True)
            # in the backward pass, index_select on flat rows is twice as fast as hidden[rows, columns]
            tokens = hidden.flatten(0, 1).index_select(0, index)
            for j, target in enumerate(flat.values()):
                project = (
                    None if self.sharing == "none" else self.heads[(i if self.sharing == "each" else 0) * len(flat) + j]
                )
                predicted = tokens if project is None else project(tokens.to(next(project.parameters()).dtype))
                losses.append(self._objective(predicted, target.to(tokens.device), sizes))
        return dict(zip(self.names, losses, strict=True))

    def loss(self, targets: Targets, visual: Visual) -> Float[Tensor, ""]:
        """Return L_VRA, the unweighted mean of `losses` over sites and targets; same arguments and errors."""
        return mean_loss(self.losses(targets, visual))

    def remove(self) -> None:
        """Remove the hooks from the model; the heads stay in this module."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._states = [], {}

    def _objective(
        self, predicted: Float[Tensor, "token d"], target: Float[Tensor, "token dim"], sizes: list[int]
    ) -> Float[Tensor, ""]:
        if self.objective != "relation":
            return (cosine_loss if self.objective == "cosine" else predict_loss)(predicted, target)
        images = zip(predicted.split(sizes), target.split(sizes), strict=True)
        return torch.stack([relation_loss(tokens, features) for tokens, features in images]).mean()

    def _hook(self, decoder: Any, where: Where, *, final_norm: bool) -> None:
        """Register the hooks.

        Hooks on the decoder mark the begin and the end of a forward pass: activation checkpointing runs the blocks
        again in the backward pass, and those states must not be recorded.
        """
        self._handles.append(decoder.register_forward_pre_hook(self._begin))
        self._handles.append(decoder.register_forward_hook(self._end, always_call=True))
        for layer in self.layers:
            block = decoder.layers[layer - 1]
            if final_norm and layer == len(decoder.layers):
                block = final_norm_of(decoder)
            if where == "output":
                self._handles.append(block.register_forward_hook(partial(self._keep_output, layer)))
            else:
                o_proj = output_projection(block, layer)
                self._handles.append(o_proj.register_forward_pre_hook(partial(self._keep_input, layer)))

    def _begin(self, *_: object) -> None:
        self._running, self._states, self._with_gradient = True, {}, torch.is_grad_enabled()

    def _end(self, *_: object) -> None:
        self._running = False

    def _keep_output(self, layer: int, _: nn.Module, __: object, output: Any) -> None:
        if self._running:
            self._states[layer] = output[0] if isinstance(output, tuple) else output

    def _keep_input(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not self._running:
            return
        if self._with_gradient and not torch.is_grad_enabled():
            raise ModelError(
                "re-entrant activation checkpointing cuts the attention's output off from the gradient of the alignment"
                " loss: expected use_reentrant=False"
            )
        self._states[layer] = args[0]


def attach_alignment(
    model: Any,
    *,
    layers: Sequence[int | Site],
    dims: Mapping[str, int],
    objective: Objective = "cosine",
    heads: Heads = "each",
    where: Where = "output",
    hidden: int = 2048,
    final_norm: bool = False,
) -> Alignment:
    """Attach alignment heads to a model without changing it: hooks read its layers, the returned module has the heads.

    Call this after LoRA and any other change to the model's modules, and give the parameters of the returned module to
    the optimizer.

    Args:
        model: an `MLLM`, or a transformers model of a family that `workbench.mllm` knows.
        layers: numbers from 1 to L; layer l is the output of block l, before the final norm. For `where="heads"` pairs
            (layer, head) of attention heads, numbered from 0.
        final_norm: read layer L after the final norm instead, as transformers' `hidden_states[L]` is; L must be among
            `layers`, and `where` must be `output`.
        dims: width of each target by its name, such as {"dinov2-small": 384}.
        objective: `cosine` for `cosine_loss`, `predict` for `predict_loss`, `relation` for `relation_loss` within each
            image or tile.
        heads: `each` gives every layer (or attention head) an alignment head for each target, `shared` has one for each
            target for all of them, and `none` (with `relation` only) compares the visual tokens without one.
        where: `output` reads the output of a block, `attention` the concatenated outputs of its attention heads, which
            are the input of o_proj, and `heads` the outputs of single attention heads.
        hidden: width of the two hidden layers of a head.

    Raises:
        ConfigError, UnknownNameError: the model does not have such a layer, or the options do not fit together.
        ModelError: a block has no `self_attn.o_proj`.
    """
    for name, value, kind in (("objective", objective, Objective), ("heads", heads, Heads), ("where", where, Where)):
        if value not in get_args(kind):
            raise UnknownNameError(name, value, get_args(kind))
    decoder = model.decoder if isinstance(model, MLLM) else model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    blocks, sites = decoder.layers, _sites(layers, where)
    for layer, _ in sites:
        if not 1 <= layer <= len(blocks):
            raise ConfigError(f"layer is {layer}: expected 1 to {len(blocks)}, the layers of the model")
    if not layers or not dims or len(set(layers)) < len(layers):
        raise ConfigError(
            f"layers are {list(layers)} and targets {list(dims)}: expected at least one of each, and no layer twice"
        )
    if final_norm and (where != "output" or len(blocks) not in layers):
        raise ConfigError(
            f"final_norm with {where} of layers {list(layers)}: expected the output of layer {len(blocks)}, the last"
            " one, among them"
        )
    if heads == "none" and objective != "relation":
        raise ConfigError(
            f"objective {objective} without heads: expected heads each or shared, since only relation can compare"
            " tokens and features of different widths"
        )
    text = model.config.get_text_config()
    counts = {} if where != "heads" else {layer: head_count(text, blocks[layer - 1], layer) for layer, _ in sites}
    for layer, head in sites:
        if head is not None and not 0 <= head < counts[layer]:
            raise ConfigError(
                f"attention head is {head}: expected 0 to {counts[layer] - 1}, the heads of layer {layer}"
            )
    widths = {
        (layer, head): text.hidden_size
        if where == "output"
        else output_projection(blocks[layer - 1], layer).in_features // counts.get(layer, 1)
        for layer, head in sites
    }
    if heads == "shared" and len(set(widths.values())) > 1:
        raise ConfigError(
            f"heads are shared by layers of widths {sorted(set(widths.values()))}: expected layers of the same width,"
            " or heads each"
        )
    alignment = Alignment(widths, dims, objective, heads, hidden).to(next(blocks[0].parameters()).device)
    alignment._head_counts = counts
    alignment._hook(decoder, where, final_norm=final_norm)
    return alignment


def attach(
    model: Any, settings: AlignmentConfig, dims: Mapping[str, int], chosen: Sequence[Site] | None = None
) -> Alignment | None:
    """Attach the alignment heads that a recipe asks for, as `attach_alignment` does; return None for a baseline.

    Args:
        settings: the section `alignment` of the recipe.
        chosen: the attention heads that are aligned, where the recipe chooses single ones.
    """
    if settings.objective == "none":
        return None
    return attach_alignment(
        model,
        layers=settings.layer if chosen is None else chosen,
        dims=dims,
        objective=settings.objective,
        heads=settings.heads,
        where=settings.where,
        final_norm=settings.final_norm,
        hidden=settings.hidden,
    )


def _sites(layers: Sequence[int | Site], where: Where) -> list[Site]:
    """Return the sites in ascending order.

    Raises:
        ConfigError: a layer where a pair of layer and attention head is expected, or the other way round.
    """
    for site in layers:
        if isinstance(site, tuple) != (where == "heads"):
            expected = "pairs (layer, head)" if where == "heads" else "numbers of layers"
            raise ConfigError(f"layers contains {site} with where {where}: expected {expected}")
    pairs = [site if isinstance(site, tuple) else (site, -1) for site in layers]
    return [(layer, head if where == "heads" else None) for layer, head in sorted(pairs)]


def site_name(site: Site) -> str:
    """Return the name of a site in the log."""
    layer, head = site
    return f"layer_{layer}" if head is None else f"layer_{layer}_head_{head}"


def _token_positions(visual: Visual) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """Return row and column of each visual token in the batch, and the number of tokens of each image or tile."""
    if isinstance(visual, Tensor):
        rows, columns = visual.nonzero(as_tuple=True)
        sizes = [count for count in visual.sum(1).tolist() if count]
    else:
        parts = [(row, part.index) for row, sample in enumerate(visual) for part in sample]
        sizes = [len(index) for _, index in parts]
        rows, columns = (
            torch.cat(indices) if indices else torch.empty(0)
            for indices in ([torch.full_like(index, row) for row, index in parts], [index for _, index in parts])
        )
    if not sum(sizes):
        raise DataError("no sample of the batch has an image: expected visual tokens to align")
    return (rows, columns), sizes


def _one_row_per_token(name: str, target: Any, dim: int, count: int) -> Float[Tensor, "token dim"]:
    """Flatten a target to one row for each of the `count` visual tokens."""

    def leaves(value: Any) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in leaves(part)]

    parts = leaves(target)
    if not parts or any(part.shape[-1] != dim for part in parts):
        widths = sorted({part.shape[-1] for part in parts})
        raise DataError(f"target '{name}' has width {', '.join(map(str, widths)) or '(none)'}: expected {dim}")
    flat = torch.cat([part.reshape(-1, dim) for part in parts]) if len(parts) > 1 else parts[0].reshape(-1, dim)
    if len(flat) != count:
        raise DataError(f"target '{name}' has {len(flat)} tokens: expected {count}, the visual tokens of the batch")
    return flat
