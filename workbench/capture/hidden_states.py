"""Read the hidden states of visual tokens in every layer, in one forward pass."""

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
from workbench.mllm.family import Batch, VisualTokens, final_norm_of


@dataclass(frozen=True)
class Activations:
    """Hidden states of one sample, on the CPU in float32.

    Attributes:
        values: hidden states (layer, token, d).
        layers: the layer number of each entry of `values`.
        tokens: the position in `input_ids` of each token.
        encoder_features: the projector's input for each visual token, if it was asked for: the vision encoder's
            features, of several patches side by side where the projector merges patches.
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
    places: Sequence[Sequence[VisualTokens]] | None = None,
    final_norm: bool = False,
) -> list[Activations]:
    """Return the hidden states of each sample of a batch, from one forward pass.

    Only the tokens that are asked for leave the device.

    Args:
        layers: 0 to L, in the order wanted; by default all.
        tokens: `visual` for the visual tokens of all images of a sample in order, `all` for every position that is not
            padding.
        encoder: also read the vision encoder's features of the visual tokens.
        places: the visual tokens to read, [sample][part]; by default all, as `mllm.visual_tokens` returns them.
        final_norm: read layer L, the last one, after the final norm, as transformers' `hidden_states[L]` is; without
            it, layer L is the output of block L, as all others are of their blocks.

    Raises:
        ConfigError: a layer that the model does not have.
        ModelError: `encoder` is set, but a visual token mixes the features of several places.
    """
    wanted = check_layers(mllm, layers)
    visual = mllm.visual_tokens(batch) if places is None else places
    if tokens == "visual":
        positions = positions_of(visual)
    else:
        positions = [row.nonzero().flatten() for row in batch.inputs["attention_mask"]]
    values: list[Tensor] = []
    features: list[Tensor] = []
    copies = Copies()

    def keep(layer: int, hidden: Tensor) -> None:
        if layer in wanted:
            if not values:
                width = hidden.shape[-1]
                values.extend(copies.empty(hidden.device, len(wanted), len(index), width) for index in positions)
            for row, index, target in zip(hidden, positions, values, strict=True):
                copies.start(row[index.to(row.device)].float(), target[wanted.index(layer)])

    def keep_features(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        features.extend(
            one_row_per_token(mllm, args[0])[rows.to(args[0].device)].float().cpu()
            for rows in encoder_rows(mllm, visual)
        )

    with (
        mllm.lock,
        torch.inference_mode(),
        _hooks(mllm, keep, keep_features if encoder else None, final_norm=final_norm),
    ):
        mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
        copies.finish()
    return [
        Activations(values[sample], tuple(wanted), positions[sample].cpu(), features[sample] if features else None)
        for sample in range(len(batch))
    ]


class Copies:
    """Copies tensors to host memory on a CUDA stream of its own, so that the GPU goes on computing meanwhile.

    Tensors on the CPU are copied in the ordinary way.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @staticmethod
    def empty(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return host memory for values of `device`.

        It is pinned if the device is a GPU, since copies into other memory are slow and block.
        """
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def start(self, values: Tensor, target: Tensor) -> None:
        """Start to copy `values` into `target`, which has them after `finish`."""
        if not values.is_cuda:
            target.copy_(values)
            return
        stream = self._streams.get(values.device) or self._streams.setdefault(
            values.device, torch.cuda.Stream(values.device)
        )
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            target.copy_(values, non_blocking=True)
        values.record_stream(stream)  # its memory must not be reused before the copy is done

    def finish(self) -> None:
        """Wait until all copies are done."""
        for stream in self._streams.values():
            stream.synchronize()


def check_layers(mllm: MLLM, layers: Sequence[int] | None, *, first: int = 0, final_norm: bool = False) -> list[int]:
    """Return `layers` without duplicates, or all layers from `first` to L if none are given.

    Args:
        final_norm: whether layer L is to be read after the final norm, so that it must be among them.

    Raises:
        ConfigError: a layer outside `first` to L, or no layer L for `final_norm`.
    """
    for layer in layers or ():
        if not first <= layer <= mllm.n_layers:
            raise ConfigError(f"layer {layer} does not exist in {mllm.name}: expected {first} to {mllm.n_layers}")
    if final_norm and layers and mllm.n_layers not in layers:
        raise ConfigError(
            f"final_norm is yes and layers {', '.join(map(str, layers))}: expected {mllm.n_layers}, the last layer of"
            f" {mllm.name}, among them, since only that one is followed by the final norm"
        )
    return list(dict.fromkeys(layers)) if layers else list(range(first, mllm.n_layers + 1))


@contextmanager
def _hooks(
    mllm: MLLM, keep: Callable[[int, Tensor], None], keep_features: Callable[..., None] | None, *, final_norm: bool
) -> Iterator[None]:
    """Call `keep(layer, hidden)` for every layer, and `keep_features` as a pre-hook of the projector."""
    blocks = list(mllm.decoder.layers)
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    if final_norm:
        blocks[-1] = final_norm_of(mllm.decoder)
    for number, block in enumerate(blocks, start=1):
        handles.append(block.register_forward_hook(lambda _, __, output, layer=number: keep(layer, output)))
    if keep_features is not None:
        handles.append(mllm.projector.register_forward_pre_hook(keep_features))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions_of(visual: Sequence[Sequence[VisualTokens]]) -> list[Int[Tensor, " _token"]]:
    """Return the positions of all visual tokens of each sample, empty for a sample without images."""
    return [_concatenated([part.index for part in sample]) for sample in visual]


def _concatenated(indices: list[Tensor]) -> Int[Tensor, " token"]:
    return torch.cat(indices) if indices else torch.empty(0, dtype=torch.long)


def one_row_per_token(mllm: MLLM, features: Tensor) -> Float[Tensor, "row features"]:
    """Return the projector's input with one row for each visual token, patches that it merges side by side."""
    return features.reshape(-1, features.shape[-1] * mllm.family.rows_per_token(mllm.config))


def encoder_rows(mllm: MLLM, visual: Sequence[Sequence[VisualTokens]]) -> list[Int[Tensor, " _token"]]:
    """Return, for each visual token of each sample, the row of the projector's input that it is computed from.

    Raises:
        ModelError: a token mixes several rows.
    """
    rows = [_concatenated([part.rows for part in sample if part.rows is not None]) for sample in visual]
    if any((sample_rows < 0).any() for sample_rows in rows):
        raise ModelError(
            f"{mllm.family.name}: this image has so many tiles that its tokens mix several encoder features, so the"
            " encoder's features cannot be read or edited: expected smaller images"
        )
    return rows
