"""Visual representation alignment: objectives, heads, and the hooks that read a model's visual tokens while it trains
(VIRAL, arXiv 2509.07979).

`attach_alignment` works on any model of workbench/mllm, unmodified, in a training loop of your own
(docs/howto/own_loop.md); the trainer uses the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.errors import ConfigError, DataError, ModelError, UnknownNameError
from workbench.mllm import MLLM, VisualTokens

Objective = Literal["cosine", "relation"]
Heads = Literal["each", "shared", "none"]
Where = Literal["output", "attention"]
Targets = Mapping[str, Tensor | Sequence[Any]]
Visual = Bool[Tensor, "b s"] | Sequence[Sequence[VisualTokens]]


class AlignmentHead(nn.Sequential):
    """P_pi: a three-layer MLP with SiLU from the language model's width to the VFM's (docs/paper.md: D -> hidden ->
    hidden -> dim)."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )


def cosine_loss(predicted: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """L_VRA = -(1/N) sum_i cos(P_pi(e_i), y_i), in -1..1; no gradient reaches the target."""
    return -torch.nn.functional.cosine_similarity(predicted.float(), target.detach().float(), dim=-1).mean()


def relation_loss(predicted: Float[Tensor, "token d"], target: Float[Tensor, "token dim"]) -> Float[Tensor, ""]:
    """L_rel = (1/N^2) sum_ij (cos(p_i, p_j) - cos(y_i, y_j))^2 over the N tokens of one image, in 0..4; no gradient
    reaches the target.

    The diagonal counts, with 0 (as in the official code). The two widths may differ.
    """
    own, other = (nn.functional.normalize(values.float(), dim=-1) for values in (predicted, target.detach()))
    # which would take both products in bfloat16, and the loss is their small difference
    with torch.autocast(own.device.type, enabled=False):
        return nn.functional.mse_loss(own @ own.T, other @ other.T)


class Alignment(nn.Module):
    """The heads, and the hooks that keep the visual tokens of some layers while the model runs; made by
    `attach_alignment`.

    The module holds the heads only, so `parameters()` is what an optimiser needs beside the model's own. One forward
    pass of the model, then `loss(...)`: the states kept are those of the latest pass, and they are taken once.

    Attributes:
        heads: layer by layer, within a layer target by target; with shared heads one for each target.
    """

    def __init__(
        self, widths: Mapping[int, int], dims: Mapping[str, int], objective: Objective, heads: Heads, hidden: int
    ) -> None:
        super().__init__()
        self.layers, self.dims, self.objective, self.sharing = tuple(widths), dict(dims), objective, heads
        given = {"each": list(widths.values()), "shared": list(widths.values())[:1], "none": []}[heads]
        self.heads = nn.ModuleList(AlignmentHead(width, hidden, dim) for width in given for dim in dims.values())
        self._handles: list[RemovableHandle] = []
        self._states: dict[int, Tensor] = {}
        self._running, self._with_gradient = False, False

    def losses(self, targets: Targets, visual: Visual) -> dict[str, Float[Tensor, ""]]:
        """The loss of each layer and target after a forward pass, as `layer_L/target`; nothing is summed or weighted.

        Args:
            targets: for each name of `dims` the features of the visual tokens: a tensor whose rows (its last dim is the
                width) follow one another image by image, or a list of tensors (token, dim), one for each image or tile,
                nested as it likes.
            visual: which positions are visual tokens: a mask with one image in each row, or
                `mllm.visual_tokens(batch)`.

        Raises:
            ModelError: no forward pass since the last call, or one that did not reach all layers.
            DataError: targets of other names, widths or numbers of tokens.
        """
        states, self._states = self._states, {}
        if not states:
            raise ModelError(
                "the alignment loss was asked for before a forward pass of the model: expected one pass, then one loss"
            )
        if set(states) != set(self.layers):
            lost = sorted(set(self.layers) - set(states))
            raise ModelError(
                f"the forward pass gave no states of layers {lost}: attach the alignment after the last change to the"
                " model's modules (LoRA)"
            )
        if set(targets) != set(self.dims):
            raise DataError(f"targets are {', '.join(targets) or '(none)'}: expected {', '.join(self.dims)}")
        (rows, columns), sizes = _places(visual)
        flat = {name: _rows(name, targets[name], dim, sum(sizes)) for name, dim in self.dims.items()}
        found = {}
        for i, (layer, hidden) in enumerate(states.items()):
            at = (rows * hidden.shape[1] + columns).to(hidden.device)
            # whose gradient is added row by row, twice as fast as by two indices
            tokens = hidden.flatten(0, 1).index_select(0, at)
            for j, (name, target) in enumerate(flat.items()):
                head = (
                    None if self.sharing == "none" else self.heads[(i if self.sharing == "each" else 0) * len(flat) + j]
                )
                predicted = tokens if head is None else head(tokens.to(next(head.parameters()).dtype))
                found[f"layer_{layer}/{name}"] = self._objective(predicted, target.to(tokens.device), sizes)
        return found

    def loss(self, targets: Targets, visual: Visual) -> Float[Tensor, ""]:
        """L_VRA: the mean of `losses` over layers and targets, each with the same weight; arguments and errors as
        there."""
        return mean_loss(self.losses(targets, visual))

    def remove(self) -> None:
        """Take the hooks off the model; the heads stay."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._states = [], {}

    def _objective(
        self, predicted: Float[Tensor, "token d"], target: Float[Tensor, "token dim"], sizes: list[int]
    ) -> Float[Tensor, ""]:
        if self.objective == "cosine":
            return cosine_loss(predicted, target)
        return torch.stack(
            [relation_loss(own, other) for own, other in zip(predicted.split(sizes), target.split(sizes), strict=True)]
        ).mean()

    def _hook(self, decoder: Any, where: Where) -> None:
        """The decoder says when a pass begins and ends, so that what activation checkpointing computes again in
        backward is not kept."""
        self._handles.append(decoder.register_forward_pre_hook(self._begin))
        self._handles.append(decoder.register_forward_hook(self._end, always_call=True))
        for layer in self.layers:
            block = decoder.layers[layer - 1]
            if where == "output":
                self._handles.append(block.register_forward_hook(partial(self._keep_output, layer)))
            else:
                self._handles.append(
                    _attention_output(block, layer).register_forward_pre_hook(partial(self._keep_input, layer))
                )

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
                "re-entrant activation checkpointing hides the attention's output from the loss: expected"
                " use_reentrant=False"
            )
        self._states[layer] = args[0]


def mean_loss(losses: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The mean of the losses of layers and targets."""
    return torch.stack(list(losses.values())).mean()


def attach_alignment(
    model: Any,
    *,
    layers: Sequence[int],
    dims: Mapping[str, int],
    objective: Objective = "cosine",
    heads: Heads = "each",
    where: Where = "output",
    hidden: int = 2048,
) -> Alignment:
    """Give `model` alignment heads without changing it: hooks read the layers, the heads are in the returned module.

    Call it last, after LoRA or other changes to the model's modules, and give the heads' parameters to the optimiser.

    Args:
        model: an `MLLM`, or a transformers model of one of its families.
        layers: 1 to L; layer l is the output of block l, before the final norm.
        dims: width of the targets by name, such as {"dinov2-small": 384}.
        objective: `cosine_loss`, or `relation_loss` within each image or tile.
        heads: `each` layer its own head for each target, `shared` by all layers, or `none`, where `relation` compares
            the tokens as they are.
        where: `output` of the block, or what its `attention` gives: all heads side by side, which is the input of
            o_proj.
        hidden: width of a head's two hidden layers.

    Raises:
        ConfigError, UnknownNameError: a layer that the model does not have, or options that do not fit together.
        ModelError: a block without an attention of the usual kind.
    """
    for name, value, kind in (("objective", objective, Objective), ("heads", heads, Heads), ("where", where, Where)):
        if value not in get_args(kind):
            raise UnknownNameError(name, value, get_args(kind))
    decoder = model.decoder if isinstance(model, MLLM) else model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    blocks = decoder.layers
    for layer in layers:
        if not 1 <= layer <= len(blocks):
            raise ConfigError(f"layer is {layer}: expected 1 to {len(blocks)}, the layers of the model")
    if not layers or not dims or len(set(layers)) < len(layers):
        raise ConfigError(
            f"layers are {list(layers)} and targets {list(dims)}: expected at least one of each, none of them twice"
        )
    if heads == "none" and objective != "relation":
        raise ConfigError(
            f"objective {objective} without heads: expected heads each or shared, since only relation compares tokens"
            " of unlike widths"
        )
    width = model.config.get_text_config().hidden_size
    widths = {
        layer: width if where == "output" else _attention_output(blocks[layer - 1], layer).in_features
        for layer in sorted(layers)
    }
    if heads == "shared" and len(set(widths.values())) > 1:
        raise ConfigError(f"heads are shared by layers of widths {sorted(set(widths.values()))}: expected one width")
    alignment = Alignment(widths, dims, objective, heads, hidden).to(next(blocks[0].parameters()).device)
    alignment._hook(decoder, where)
    return alignment


def _attention_output(block: Any, layer: int) -> Any:
    """The projection that mixes the heads' outputs, o_proj."""
    found = getattr(getattr(block, "self_attn", None), "o_proj", None)
    if found is None:
        raise ModelError(f"block {layer} has no attention of the usual kind: expected a self_attn with an o_proj")
    return found


def _places(visual: Visual) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """Row and position of each visual token, and how many there are of each image or tile."""
    if isinstance(visual, Tensor):
        rows, columns = visual.nonzero(as_tuple=True)
        sizes = [count for count in visual.sum(1).tolist() if count]
    else:
        parts = [(row, part.index) for row, sample in enumerate(visual) for part in sample]
        sizes = [len(index) for _, index in parts]
        rows, columns = (
            torch.cat(own) if own else torch.empty(0)
            for own in ([torch.full_like(i, row) for row, i in parts], [i for _, i in parts])
        )
    if not sum(sizes):
        raise DataError("no sample of the batch has an image: expected visual tokens to align")
    return (rows, columns), sizes


def _rows(name: str, target: Any, dim: int, count: int) -> Float[Tensor, "token dim"]:
    """A target as one row for each visual token."""

    def leaves(value: Any) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in leaves(part)]

    found = leaves(target)
    if not found or any(part.shape[-1] != dim for part in found):
        widths = sorted({part.shape[-1] for part in found})
        raise DataError(f"target '{name}' has width {', '.join(map(str, widths)) or '(none)'}: expected {dim}")
    flat = torch.cat([part.reshape(-1, dim) for part in found]) if len(found) > 1 else found[0].reshape(-1, dim)
    if len(flat) != count:
        raise DataError(f"target '{name}' has {len(flat)} tokens: expected {count}, the visual tokens of the batch")
    return flat


def weight_at(
    step: int, *, steps: int, weight: float, schedule: str = "constant", final: float = 0.0, warmup: int = 0
) -> float:
    """lambda in L = L_LM + lambda * L_VRA at optimiser step `step`, from 0; a function of the step alone, so a resumed
    run has the same.

    It rises over `warmup` steps, as weight * (step + 1) / warmup, and then stays, or goes to `final`, which the last
    step has: with t from 0 to 1, linear: weight + (final - weight) t; cosine: final + (weight - final) (1 + cos(pi t))
    / 2.
    """
    if step < warmup:
        return weight * (step + 1) / warmup
    if schedule == "constant":
        return weight
    between = steps - 1 - warmup
    t = min(1.0, (step - warmup) / between) if between > 0 else 1.0
    return final + (weight - final) * (1 - t if schedule == "linear" else (1 + math.cos(math.pi * t)) / 2)
