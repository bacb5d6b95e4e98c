"""Hidden states of visual tokens in every layer, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import ConfigError, ModelError
from workbench.mllm.base import MLLM
from workbench.mllm.family import Batch, VisualTokens


@dataclass(frozen=True)
class Activations:
    """Hidden states of one sample, on the CPU in float32.

    Attributes:
        values: one row of tokens for each layer.
        layers: the layer number of each row of `values`.
        tokens: positions in `input_ids` of each token.
        tower: what the connector received for each visual token, if it was asked for: the tower's features, several
            patches side by side where the connector merges them.
    """

    values: Float[Tensor, "layer token d"]
    layers: tuple[int, ...]
    tokens: Int[Tensor, " token"]
    encoder_features: Float[Tensor, "token features"] | None = None


def read(
    mllm: MLLM,
    batch: Batch,
    *,
    layers: Sequence[int] | None = None,
    tokens: Literal["visual", "all"] = "visual",
    encoder: bool = False,
) -> list[Activations]:
    """Read the hidden states of `batch` at `layers` (all, 0 to L, by default) in one forward pass; only the tokens
    asked for leave the device.

    Args:
        tokens: `visual` for the visual tokens of all images of a sample in order, `all` for every position that is not
            padding.
        tower: also read the tower's features of the visual tokens.

    Raises:
        ConfigError: a layer that the model does not have.
        ModelError: the tower is asked for where a visual token mixes several of its features.
    """
    wanted = check_layers(mllm, layers)
    found = mllm.visual_tokens(batch)
    index = (
        positions_of(found)
        if tokens == "visual"
        else [row.nonzero().flatten() for row in batch.inputs["attention_mask"]]
    )
    values: list[Tensor] = []
    features: list[Tensor] = []
    copies = Copies()

    def keep(layer: int, hidden: Tensor) -> None:
        if layer in wanted:
            if not values:
                values.extend(copies.empty(hidden.device, len(wanted), len(where), hidden.shape[-1]) for where in index)
            for row, where, kept in zip(hidden, index, values, strict=True):
                copies.start(row[where.to(row.device)].float(), kept[wanted.index(layer)])

    def keep_tower(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        features.extend(
            one_row_per_token(mllm, args[0])[rows.to(args[0].device)].float().cpu()
            for rows in encoder_rows(mllm, found)
        )

    with mllm.lock, torch.inference_mode(), _hooks(mllm, keep, keep_tower if encoder else None):
        mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
        copies.finish()
    return [
        Activations(values[row], tuple(wanted), index[row].cpu(), features[row] if features else None)
        for row in range(len(batch))
    ]


class Copies:
    """Copies of tensors in host memory, made on a stream of their own, so that a GPU goes on computing; ordinary copies
    where the values are on the CPU."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @staticmethod
    def empty(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Host memory for values of `device`, pinned for a GPU's: into other memory it copies slowly, and with
        everything waiting."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def start(self, values: Tensor, kept: Tensor) -> None:
        """Copy `values` into `kept`, which holds them after `finish`."""
        if not values.is_cuda:
            kept.copy_(values)
            return
        stream = self._streams.get(values.device) or self._streams.setdefault(
            values.device, torch.cuda.Stream(values.device)
        )
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
    """Call `keep(layer, hidden)` for the input of the first block and the output of every block, `keep_tower` for the
    connector's input."""
    blocks = mllm.decoder.layers
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for number, block in enumerate(blocks, start=1):
        handles.append(block.register_forward_hook(lambda _, __, output, layer=number: keep(layer, output)))
    if keep_tower is not None:
        handles.append(mllm.projector.register_forward_pre_hook(keep_tower))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions_of(found: list[list[VisualTokens]]) -> list[Int[Tensor, " token"]]:
    """Positions of all visual tokens of each sample, none where it has no image."""
    return [
        torch.cat([part.index for part in sample]) if sample else torch.empty(0, dtype=torch.long) for sample in found
    ]


def one_row_per_token(mllm: MLLM, features: Tensor) -> Float[Tensor, "row features"]:
    """The connector's input, one row for each visual token."""
    return features.reshape(-1, features.shape[-1] * mllm.family.rows_per_token(mllm.config))


def encoder_rows(mllm: MLLM, found: list[list[VisualTokens]]) -> list[Int[Tensor, " token"]]:
    """The row of the connector's input behind each visual token, by sample.

    Raises:
        ModelError: a token comes from several rows.
    """
    rows = [
        (
            torch.cat([part.rows for part in sample if part.rows is not None])
            if sample
            else torch.empty(0, dtype=torch.long)
        )
        for sample in found
    ]
    if any((own < 0).any() for own in rows):
        raise ModelError(
            f"{mllm.family.name}: this image has so many tiles that its tokens mix several tower features, so the tower"
            " cannot be read or edited"
        )
    return rows
