"""Visual representation alignment (VIRAL, arXiv 2509.07979): objectives, heads, and hooks that read the visual tokens.

`attach_alignment` works on every model that `workbench.mllm` can load, without changing it. The trainer uses it, and
you can use it in a training loop of your own (docs/howto/own_loop.md).
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
    """The projection P_pi: a three-layer MLP with SiLU, width -> hidden -> hidden -> dim (docs/paper.md).

    Args:
        width: of the visual tokens inside the language model.
        hidden: of the two hidden layers.
        dim: of the target features.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )


def cosine_loss(predicted: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    """Return L_VRA = -(1/N) sum_i cos(P_pi(e_i), y_i), from -1 to 1; no gradient reaches the target."""
    return -torch.nn.functional.cosine_similarity(predicted.float(), target.detach().float(), dim=-1).mean()


def relation_loss(predicted: Float[Tensor, "token d"], target: Float[Tensor, "token dim"]) -> Float[Tensor, ""]:
    """Return L_rel = (1/N^2) sum_ij (cos(p_i, p_j) - cos(y_i, y_j))^2 over the N tokens of one image, from 0 to 4.

    No gradient reaches the target. The mean includes the diagonal, whose terms are 0, as in the official code. The
    widths d and dim may differ.
    """
    p, y = (nn.functional.normalize(values.float(), dim=-1) for values in (predicted, target.detach()))
    # autocast would compute both products in bfloat16, but the loss is their small difference
    with torch.autocast(p.device.type, enabled=False):
        return nn.functional.mse_loss(p @ p.T, y @ y.T)


class Alignment(nn.Module):
    """Alignment heads, with hooks that record the hidden states of the aligned layers; made by `attach_alignment`.

    The module contains only the heads, so `parameters()` returns what the optimizer needs in addition to the model's
    own parameters. Run one forward pass of the model, then call `loss(...)` once: it uses the hidden states of the
    latest pass and forgets them.

    Attributes:
        heads: ordered by layer, then by target; shared heads have one for each target.
    """

    def __init__(
        self, widths: Mapping[int, int], dims: Mapping[str, int], objective: Objective, heads: Heads, hidden: int
    ) -> None:
        super().__init__()
        self.layers, self.dims, self.objective, self.sharing = tuple(widths), dict(dims), objective, heads
        head_widths = {"each": list(widths.values()), "shared": list(widths.values())[:1], "none": []}[heads]
        self.heads = nn.ModuleList(AlignmentHead(width, hidden, dim) for width in head_widths for dim in dims.values())
        self._handles: list[RemovableHandle] = []
        self._states: dict[int, Tensor] = {}  # hidden states of the latest pass, by layer
        self._running, self._with_gradient = False, False

    def losses(self, targets: Targets, visual: Visual) -> dict[str, Float[Tensor, ""]]:
        """Return the loss of each layer and target after a forward pass, unweighted, as {"layer_L/target": loss}.

        Args:
            targets: for each name of `dims`, the features of the visual tokens in the order of the batch: one tensor
                (..., dim) that is flattened to one row for each token, or tensors (token, dim), one for each image or
                tile, in lists nested to any depth.
            visual: the positions of the visual tokens: a mask (b, s) where each row has one image, or the return value
                of `mllm.visual_tokens(batch)`.

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
        losses = {}
        for i, (layer, hidden) in enumerate(states.items()):
            index = (rows * hidden.shape[1] + columns).to(hidden.device, non_blocking=True)
            # in the backward pass, index_select on flat rows is twice as fast as hidden[rows, columns]
            tokens = hidden.flatten(0, 1).index_select(0, index)
            for j, (name, target) in enumerate(flat.items()):
                head = (
                    None if self.sharing == "none" else self.heads[(i if self.sharing == "each" else 0) * len(flat) + j]
                )
                predicted = tokens if head is None else head(tokens.to(next(head.parameters()).dtype))
                losses[f"layer_{layer}/{name}"] = self._objective(predicted, target.to(tokens.device), sizes)
        return losses

    def loss(self, targets: Targets, visual: Visual) -> Float[Tensor, ""]:
        """Return L_VRA, the unweighted mean of `losses` over layers and targets; same arguments and errors."""
        return mean_loss(self.losses(targets, visual))

    def remove(self) -> None:
        """Remove the hooks from the model; the heads stay in this module."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._states = [], {}

    def _objective(
        self, predicted: Float[Tensor, "token d"], target: Float[Tensor, "token dim"], sizes: list[int]
    ) -> Float[Tensor, ""]:
        if self.objective == "cosine":
            return cosine_loss(predicted, target)
        images = zip(predicted.split(sizes), target.split(sizes), strict=True)
        return torch.stack([relation_loss(tokens, features) for tokens, features in images]).mean()

    def _hook(self, decoder: Any, where: Where) -> None:
        """Register the hooks.

        Hooks on the decoder mark the begin and the end of a forward pass: activation checkpointing runs the blocks
        again in the backward pass, and those states must not be recorded.
        """
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
                "re-entrant activation checkpointing cuts the attention's output off from the gradient of the alignment"
                " loss: expected use_reentrant=False"
            )
        self._states[layer] = args[0]


def mean_loss(losses: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the unweighted mean of the losses of all layers and targets."""
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
    """Attach alignment heads to a model without changing it: hooks read its layers, the returned module has the heads.

    Call this after LoRA and any other change to the model's modules, and give the parameters of the returned module to
    the optimizer.

    Args:
        model: an `MLLM`, or a transformers model of a family that `workbench.mllm` knows.
        layers: numbers from 1 to L; layer l is the output of block l, before the final norm.
        dims: width of each target by its name, such as {"dinov2-small": 384}.
        objective: `cosine` for `cosine_loss`, `relation` for `relation_loss` within each image or tile.
        heads: `each` gives every layer a head for each target, `shared` has one head for each target for all layers,
            and `none` (with `relation` only) compares the visual tokens without a head.
        where: `output` reads the output of a block, `attention` the concatenated outputs of its attention heads, which
            are the input of o_proj.
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
    blocks = decoder.layers
    for layer in layers:
        if not 1 <= layer <= len(blocks):
            raise ConfigError(f"layer is {layer}: expected 1 to {len(blocks)}, the layers of the model")
    if not layers or not dims or len(set(layers)) < len(layers):
        raise ConfigError(
            f"layers are {list(layers)} and targets {list(dims)}: expected at least one of each, and no layer twice"
        )
    if heads == "none" and objective != "relation":
        raise ConfigError(
            f"objective {objective} without heads: expected heads each or shared, since only relation can compare"
            " tokens and features of different widths"
        )
    width = model.config.get_text_config().hidden_size
    widths = {
        layer: width if where == "output" else _attention_output(blocks[layer - 1], layer).in_features
        for layer in sorted(layers)
    }
    if heads == "shared" and len(set(widths.values())) > 1:
        raise ConfigError(
            f"heads are shared by layers of widths {sorted(set(widths.values()))}: expected layers of the same width,"
            " or heads each"
        )
    alignment = Alignment(widths, dims, objective, heads, hidden).to(next(blocks[0].parameters()).device)
    alignment._hook(decoder, where)
    return alignment


def _attention_output(block: Any, layer: int) -> Any:
    """Return o_proj, the linear layer that mixes the outputs of a block's attention heads."""
    o_proj = getattr(getattr(block, "self_attn", None), "o_proj", None)
    if o_proj is None:
        raise ModelError(f"block {layer} has no attention module that can be aligned: expected self_attn with o_proj")
    return o_proj


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


def weight_at(
    step: int, *, steps: int, weight: float, schedule: str = "constant", final: float = 0.0, warmup: int = 0
) -> float:
    """Return lambda in L = L_LM + lambda * L_VRA at optimizer step `step`, counted from 0.

    Lambda depends on the step alone, so a resumed run continues with the same values. It first rises over `warmup`
    steps as weight * (step + 1) / warmup. Then it stays at `weight` (constant) or approaches `final`, which it reaches
    at the last step; with t from 0 to 1 over these steps, it is

        linear: weight + (final - weight) * t
        cosine: final + (weight - final) * (1 + cos(pi * t)) / 2
    """
    if step < warmup:
        return weight * (step + 1) / warmup
    if schedule == "constant":
        return weight
    between = steps - 1 - warmup
    t = min(1.0, (step - warmup) / between) if between > 0 else 1.0
    return final + (weight - final) * (1 - t if schedule == "linear" else (1 + math.cos(math.pi * t)) / 2)
