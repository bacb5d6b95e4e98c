"""Reading and editing what a model computes: hidden states, attention rows, and interventions on the visual tokens.

Layer numbers, everywhere: 0 is what the first block receives, l is the output of block l, before the final norm. transformers' own last hidden state
comes after that norm, so it is never used here. At the visual positions layer 0 is the projector's output (checked when a model is loaded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workbench.errors import ConfigError, ModelError
from workbench.mllm.base import MLLM, last_logits, positions_to_keep
from workbench.mllm.family import Batch, VisualTokens

Place = Literal["encoder", "projector"] | int


@dataclass(frozen=True)
class Activations:
    """Hidden states of one sample, on the CPU in float32.

    Attributes:
        values: one row of tokens for each layer.
        layers: the layer number of each row of `values`.
        tokens: positions in `input_ids` of each token.
        tower: what the connector received for each visual token, if it was asked for: the tower's features, several patches side by side
            where the connector merges them.
    """

    values: Float[Tensor, "layer token d"]
    layers: tuple[int, ...]
    tokens: Int[Tensor, token]  # noqa: F821
    tower: Float[Tensor, "token features"] | None = None


def read(
    mllm: MLLM, batch: Batch, *, layers: Sequence[int] | None = None, tokens: Literal["visual", "all"] = "visual", tower: bool = False
) -> list[Activations]:
    """Read the hidden states of `batch` at `layers` (all, 0 to L, by default) in one forward pass; only the tokens asked for leave the device.

    Args:
        tokens: `visual` for the visual tokens of all images of a sample in order, `all` for every position that is not padding.
        tower: also read the tower's features of the visual tokens.

    Raises:
        ConfigError: a layer that the model does not have.
        ModelError: the tower is asked for where a visual token mixes several of its features.
    """
    wanted = check_layers(mllm, layers)
    found = mllm.visual_tokens(batch)
    index = _positions_of(found) if tokens == "visual" else [row.nonzero().flatten() for row in batch.inputs["attention_mask"]]
    values: list[Tensor] = []
    features: list[Tensor] = []
    copies = _Copies()

    def keep(layer: int, hidden: Tensor) -> None:
        if layer in wanted:
            if not values:
                values.extend(copies.empty(hidden.device, len(wanted), len(where), hidden.shape[-1]) for where in index)
            for row, where, kept in zip(hidden, index, values, strict=True):
                copies.start(row[where.to(row.device)].float(), kept[wanted.index(layer)])

    def keep_tower(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        features.extend(by_token(mllm, args[0])[rows.to(args[0].device)].float().cpu() for rows in tower_rows(mllm, found))

    with mllm.lock, torch.inference_mode(), _hooks(mllm, keep, keep_tower if tower else None):
        mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
        copies.finish()
    return [Activations(values[row], tuple(wanted), index[row].cpu(), features[row] if features else None) for row in range(len(batch))]


class _Copies:
    """Copies of tensors in host memory, made on a stream of their own, so that a GPU goes on computing; ordinary copies where the values are on the CPU."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @staticmethod
    def empty(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Host memory for values of `device`, pinned for a GPU's: into other memory it copies slowly, and with everything waiting."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def start(self, values: Tensor, kept: Tensor) -> None:
        """Copy `values` into `kept`, which holds them after `finish`."""
        if not values.is_cuda:
            kept.copy_(values)
            return
        stream = self._streams.get(values.device) or self._streams.setdefault(values.device, torch.cuda.Stream(values.device))
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            kept.copy_(values, non_blocking=True)
        values.record_stream(stream)  # its memory is not given to others before

    def finish(self) -> None:
        """Wait for all copies."""
        for stream in self._streams.values():
            stream.synchronize()


def check_layers(mllm: MLLM, layers: Sequence[int] | None, *, first: int = 0) -> list[int]:
    """Return `layers`, or all of them where none are named."""
    for layer in layers or ():
        if not first <= layer <= mllm.n_layers:
            raise ConfigError(f"layer {layer} does not exist in {mllm.name}: expected {first} to {mllm.n_layers}")
    return list(dict.fromkeys(layers)) if layers else list(range(first, mllm.n_layers + 1))


@contextmanager
def _hooks(mllm: MLLM, keep: Callable[[int, Tensor], None], keep_tower: Callable[..., None] | None) -> Iterator[None]:
    """Call `keep(layer, hidden)` for the input of the first block and the output of every block, `keep_tower` for the connector's input."""
    blocks = mllm.decoder.layers
    handles = [blocks[0].register_forward_pre_hook(lambda _, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]
    for number, block in enumerate(blocks, start=1):
        handles.append(block.register_forward_hook(lambda _, __, output, layer=number: keep(layer, output)))
    if keep_tower is not None:
        handles.append(mllm.connector.register_forward_pre_hook(keep_tower))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _positions_of(found: list[list[VisualTokens]]) -> list[Int[Tensor, token]]:  # noqa: F821
    """Positions of all visual tokens of each sample, none where it has no image."""
    return [torch.cat([part.index for part in sample]) if sample else torch.empty(0, dtype=torch.long) for sample in found]


def by_token(mllm: MLLM, features: Tensor) -> Float[Tensor, "row features"]:
    """The connector's input, one row for each visual token."""
    return features.reshape(-1, features.shape[-1] * mllm.family.merged(mllm.config))


def tower_rows(mllm: MLLM, found: list[list[VisualTokens]]) -> list[Int[Tensor, token]]:  # noqa: F821
    """The row of the connector's input behind each visual token, by sample.

    Raises:
        ModelError: a token comes from several rows.
    """
    rows = [torch.cat([part.rows for part in sample if part.rows is not None]) if sample else torch.empty(0, dtype=torch.long) for sample in found]
    if any((own < 0).any() for own in rows):
        raise ModelError(f"{mllm.family.name}: this image has so many tiles that its tokens mix several tower features, so the tower cannot be read or edited")
    return rows


# --- attention -------------------------------------------------------------------------------------------------------------------------


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
        scores = ((grouped @ self.key[:, :, None].mT) * (width**-0.5 if self.scaling is None else self.scaling)).flatten(1, 2).float()
        if self.mask is not None:
            allowed = self.mask.expand(batch, -1, length, -1)[..., : self.key.shape[2]]
            allowed = allowed.gather(2, rows[:, None, :, None].expand(batch, allowed.shape[1], rows.shape[1], allowed.shape[3]))
            scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
        elif self.causal:
            scores = scores.masked_fill(torch.arange(self.key.shape[2], device=rows.device) > rows[:, None, :, None], -torch.inf)
        return scores.softmax(-1)


@dataclass
class _Rows:
    """Collects attention probabilities of the wanted query rows while the model runs."""

    rows: Int[Tensor, "sample row"]
    blocks: set[int]
    found: dict[int, Any] = field(default_factory=dict)
    copies: _Copies = field(default_factory=_Copies)

    def take(self, block: int, scores: _Scores, value: Tensor, output: Tensor) -> Tensor:
        """Keep what is wanted of one block, and return the block's attention output."""
        rows = scores.rows(self.rows).to(scores.query.dtype)
        self.found[block] = self.copies.empty(rows.device, *rows.shape, dtype=rows.dtype)
        self.copies.start(rows, self.found[block])
        return output


class _Gradients(_Rows):
    """Computes the wanted rows' output from their probabilities, so that gradients reach these; each block keeps (probabilities, where gradients land)."""

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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, collect_rows: _Rows | None = None, **options: Any
) -> tuple[Tensor, None]:
    """sdpa, which never forms the S x S matrix, and beside it the few rows of that matrix that were asked for."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError("this model's attention has more than a softmax of scores (softcap or sinks): its rows cannot be read")
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    block = int(getattr(module, "layer_idx", -1)) + 1
    if collect_rows is not None and block in collect_rows.blocks:
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        output = collect_rows.take(block, _Scores(query, key, attention_mask, options.get("scaling"), causal), value, output)
    return output, None


ROWS = "sdpa_with_rows"
AttentionInterface.register(ROWS, _attention_with_rows)
AttentionMaskInterface.register(ROWS, sdpa_mask)


def attention(
    mllm: MLLM, batch: Batch, *, rows: Sequence[Sequence[int]], layers: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "sample head row key"]]:
    """Attention probabilities of chosen query positions, block by block, from one forward pass; the S x S matrix is never formed.

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


def gradient_attention(mllm: MLLM, batch: Batch, *, rows: Sequence[int], layers: Sequence[int] | None = None) -> Iterator[Float[Tensor, "sample head key"]]:
    """Attention probabilities of one query position of each sample, times the gradient of the logit of the token that the model predicts there.

    Block by block, with its sign: a positive value says that more attention to that key would raise the logit, to first order. Only the gradient of
    the chosen row is formed (other rows of the same block count as fixed). Chefer et al. 2021 (eq. 5) take the positive part and the mean over heads.

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
    """Attention rollout (Abnar and Zuidema 2020) of one query position of each sample to all positions of the prompt; rows sum to 1.

    The product over blocks of (A + I) / 2, A the mean over heads. It is taken from the last block down, one row of it at a time, so that no more than
    `chunk` rows of an attention matrix exist at once. It sees neither values nor the MLPs.

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
                mean = scores.rows(part.expand(len(batch), -1)).mean(1).nan_to_num()  # rows of padding see nothing, and nothing flows to them
                moved += (flow[:, None, part] @ mean)[:, 0]
            flow = (flow + moved) / 2
    return flow.cpu()


def _collect(mllm: MLLM, batch: Batch, collector: _Rows, *, keep: int | Tensor) -> Tensor:
    """Run the model with `collector` in its attention and return the logits of the positions to keep."""
    _check_uncapped(mllm)
    with mllm.lock, _implementation(mllm, ROWS):
        logits = mllm.model(**batch.inputs, use_cache=False, logits_to_keep=keep, collect_rows=collector).logits
        collector.copies.finish()
    missing = collector.blocks - set(collector.found)
    if missing:
        raise ModelError(f"{mllm.name}: blocks {sorted(missing)} have no attention of the usual kind to read")
    return logits


def _check_uncapped(mllm: MLLM) -> None:
    """sdpa, which reading and knockout go through, cannot cap attention scores."""
    cap = getattr(mllm.config.get_text_config(), "attn_logit_softcapping", None)
    if cap:
        raise ModelError(f"{mllm.name} caps its attention scores (attn_logit_softcapping {cap}): its attention cannot be read or knocked out row by row")


def _positions(batch: Batch, rows: Sequence[Sequence[int]]) -> Int[Tensor, "sample row"]:
    mask = batch.inputs["attention_mask"].cpu()
    length = mask.shape[1]
    if len(rows) != len(batch) or len({len(own) for own in rows}) != 1 or not len(rows[0]):
        raise ConfigError(f"rows for {len(rows)} samples of {sorted({len(own) for own in rows})} positions: expected {len(batch)} of one length, at least 1")
    positions = torch.tensor([[row + length if row < 0 else row for row in own] for own in rows])
    outside = (positions < 0) | (positions >= length)
    if outside.any():
        raise ConfigError(f"row {int(positions[outside][0])} is outside the sequence: expected {-length} to {length - 1}")
    if not mask.gather(1, positions).all():
        raise ConfigError(f"row {int(positions[mask.gather(1, positions) == 0][0])} is padding: expected positions of the prompt")
    return positions


@contextmanager
def _implementation(mllm: MLLM, name: str) -> Iterator[None]:
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


@dataclass(frozen=True)
class Blocked:
    """Query positions that may not look at some keys in some blocks (1 to L); `seen` are the blocks in which that was done."""

    blocks: frozenset[int]
    rows: Bool[Tensor, "sample query"]
    keys: Bool[Tensor, "sample key"]
    seen: set[int] = field(default_factory=set)

    def mask(self, block: int, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The attention mask of a block with the blocked pairs taken out."""
        self.seen.add(block)
        lengths = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(1, 1, *lengths, dtype=torch.bool, device=query.device)
            mask = mask.tril(lengths[1] - lengths[0]) if causal else mask
        pairs = (self.rows[:, :, None] & self.keys[:, None, : lengths[1]])[:, None].to(query.device)
        mask = mask[..., : lengths[1]]
        return mask & ~pairs if mask.dtype == torch.bool else mask.masked_fill(pairs, torch.finfo(mask.dtype).min)


def _attention_blocked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, blocked: Blocked | None = None, **options: Any
) -> tuple[Tensor, None]:
    """sdpa without the blocked pairs."""
    block = int(getattr(module, "layer_idx", -1)) + 1
    if blocked is not None and block in blocked.blocks:
        causal = options.get("is_causal")
        attention_mask = blocked.mask(block, query, key, attention_mask, bool(getattr(module, "is_causal", True) if causal is None else causal))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


BLOCKING = "sdpa_with_blocked_pairs"
AttentionInterface.register(BLOCKING, _attention_blocked)
AttentionMaskInterface.register(BLOCKING, sdpa_mask)


@contextmanager
def blocking(mllm: MLLM, blocked: Blocked) -> Iterator[None]:
    """Let the language model understand `blocked=` for a while, and see that it was done in every block that was asked for."""
    _check_uncapped(mllm)
    with _implementation(mllm, BLOCKING):
        yield
    if blocked.blocks - blocked.seen:
        raise ModelError(f"{mllm.name}: blocks {sorted(blocked.blocks - blocked.seen)} have no attention of the usual kind to knock out")


def knockout(mllm: MLLM, batch: Batch, *, blocks: Sequence[int]) -> Float[Tensor, "sample vocab"]:
    """Logits of each sample's last token when, in `blocks` (1 to L), no other position looks at the visual tokens; these still look at one another.

    The last token is that before the padding, on whichever side that is.

    Raises:
        ConfigError: a block that the model does not have.
        ModelError: the model caps its attention scores, or a block has no attention of the usual kind.
    """
    wanted = check_layers(mllm, blocks, first=1)
    keys = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    for row, parts in enumerate(mllm.visual_tokens(batch)):
        for part in parts:
            keys[row, part.index] = True
    blocked = Blocked(frozenset(wanted), ~keys, keys)
    with mllm.lock, torch.inference_mode(), blocking(mllm, blocked):
        return last_logits(mllm.model(**batch.inputs, use_cache=False, logits_to_keep=positions_to_keep(batch), blocked=blocked), batch).cpu()


# --- interventions ---------------------------------------------------------------------------------------------------------------------

Edit = Callable[[Float[Tensor, "token d"], int], Float[Tensor, "token d"]]


def check_place(mllm: MLLM, at: Place) -> Literal["encoder"] | int:
    """Return "encoder" or the layer number of a place where visual tokens can be changed.

    Raises:
        ConfigError: no such place.
        ModelError: encoder features are added again after it, so that a change would be half undone.
    """
    layer = 0 if at == "projector" else at
    if isinstance(layer, int):
        check_layers(mllm, [layer])
    elif layer != "encoder":
        raise ConfigError(f"place '{at}' does not exist: expected 'encoder', 'projector' or a layer from 0 to {mllm.n_layers}")
    injected = mllm.family.injected(mllm.config)
    if injected and (not isinstance(layer, int) or layer <= injected):
        raise ModelError(
            f"{mllm.family.name} adds encoder features to the outputs of its first {injected} blocks, so an edit at '{at}' is half undone: "
            f"expected a layer from {injected + 1} to {mllm.n_layers}"
        )
    return layer


def edit(mllm: MLLM, batch: Batch, *, at: Place, fn: Edit, keep: int = 1) -> Float[Tensor, "sample position vocab"]:
    """Logits of each sample's last `keep` tokens when the visual tokens are changed at one place on their way.

    Args:
        at: "encoder" for what the connector receives, "projector" for what it gives (layer 0), or layer l: the output of block l.
        fn: (visual tokens of one sample, its number in the batch) -> their replacement, of the same shape.
        keep: how many tokens of the prompt, in its order; padding is none, on whichever side it is.

    Raises:
        ConfigError: no such place, or a prompt of fewer than `keep` tokens.
        ModelError: encoder features are added again after that place, so that the edit would be half undone; or `fn` changed the shape.
    """
    layer = check_place(mllm, at)
    mask = batch.inputs["attention_mask"]
    if not 1 <= keep <= int(mask.sum(1).min()):
        raise ConfigError(f"keep is {keep}: expected 1 to {int(mask.sum(1).min())}, the tokens of the shortest prompt")
    found = mllm.visual_tokens(batch)
    rows = tower_rows(mllm, found) if layer == "encoder" else []
    index = _positions_of(found)
    if not any(len(own) for own in index):
        raise ModelError("no sample of the batch has an image: expected visual tokens to edit")

    def change(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        if layer == "encoder":
            flat = by_token(mllm, changed)
            for sample, own in enumerate(rows):
                if len(own):
                    flat[own] = edited(fn, flat[own], sample)
            return flat.view(hidden.shape)
        for sample, own in enumerate(index):
            if len(own):
                changed[sample, own] = edited(fn, changed[sample, own], sample)
        return changed

    with mllm.lock:
        logits = _trace(mllm, batch, layer, change, positions_to_keep(batch) + keep - 1)
    last = logits.shape[1] - 1 - mask.flip(1).long().argmax(1)
    positions = last[:, None] - torch.arange(keep - 1, -1, -1, device=mask.device)
    return logits[torch.arange(len(mask), device=mask.device)[:, None], positions].float().cpu()


def edited(fn: Edit, values: Float[Tensor, "token d"], sample: int) -> Float[Tensor, "token d"]:
    """What `fn` makes of a copy of `values`.

    Raises:
        ModelError: another shape.
    """
    new = fn(values.clone(), sample)
    if new.shape != values.shape:
        raise ModelError(f"an edit returned visual tokens of shape {tuple(new.shape)}: expected {tuple(values.shape)}")
    return new.to(values)


def _trace(mllm: MLLM, batch: Batch, layer: int | str, change: Callable[[Tensor], Tensor], keep: int) -> Tensor:
    """One traced forward pass with the change in place; the caller holds the model's lock, because traces of one model must not overlap."""
    import nnsight  # which only edits need

    own = vars(mllm.model)  # wrapping changes a model for good, so it is done once for each, and goes when the model goes
    traced = own.get("_traced") or own.setdefault("_traced", nnsight.NNsight(mllm.model))
    if layer == "encoder":
        module = traced.get(f"model.{mllm.family.connector}")
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
