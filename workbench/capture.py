"""Reading what a model computes: hidden states of the visual tokens at every layer, in one forward pass.

Layer numbers, everywhere: 0 is what the first block receives, l is the output of block l, before the final norm. transformers' own last hidden state
comes after that norm, so it is never used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import ConfigError
from workbench.mllm.base import MLLM, Batch


@dataclass(frozen=True)
class Activations:
    """Hidden states of one sample.

    Attributes:
        values: (layer, token, d), on the CPU in float32.
        layers: the layer number of each row of `values`.
        tokens: positions in `input_ids` of each token.
    """

    values: Float[Tensor, "layer token d"]
    layers: tuple[int, ...]
    tokens: Int[Tensor, token]  # noqa: F821


def read(mllm: MLLM, batch: Batch, *, layers: Sequence[int] | None = None, tokens: Literal["visual", "all"] = "visual") -> list[Activations]:
    """Read the hidden states of `batch` at `layers` (all, 0 to L, by default); only the tokens asked for leave the device.

    Args:
        tokens: `visual` for the visual tokens of all images of a sample in order, `all` for every position that is not padding.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    wanted = check_layers(mllm, layers)
    if tokens == "visual":
        index = [torch.cat([part.index for part in sample]) for sample in mllm.visual_tokens(batch)]
    else:
        index = [row.nonzero().flatten() for row in batch.inputs["attention_mask"]]
    taken: dict[int, list[Tensor]] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        if layer in wanted:
            taken[layer] = [row[where].float().cpu() for row, where in zip(hidden, index, strict=True)]

    with mllm.lock, torch.inference_mode(), _hooks(mllm, keep):
        mllm.model(**batch.inputs, use_cache=False, logits_to_keep=1)
    return [Activations(torch.stack([taken[layer][row] for layer in wanted]), tuple(wanted), index[row].cpu()) for row in range(len(batch))]


def check_layers(mllm: MLLM, layers: Sequence[int] | None) -> list[int]:
    """Return `layers`, or all of them for None."""
    for layer in layers or ():
        if not 0 <= layer <= mllm.n_layers:
            raise ConfigError(f"layer {layer} does not exist in {mllm.name}: expected 0 to {mllm.n_layers}")
    return list(dict.fromkeys(layers)) if layers else list(range(mllm.n_layers + 1))


@contextmanager
def _hooks(mllm: MLLM, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `keep(layer, hidden)` for the input of the first block and the output of every block."""
    blocks = mllm.decoder.layers
    handles = [blocks[0].register_forward_pre_hook(lambda _, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]
    for number, block in enumerate(blocks, start=1):
        handles.append(block.register_forward_hook(lambda _, __, output, layer=number: keep(layer, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
