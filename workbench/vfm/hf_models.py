"""VFMs whose network comes from transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from transformers import AutoModel

from workbench.vfm.base import CATALOGUE, IMAGENET, VFMEntry
from workbench.weights import check_unchanged, load_weights, weights_folder


def _vit(weights: str, block: int | None) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """A ViT's patch tokens: the output of `block` (before any norm), or the final normalised output where `block` is None."""
    network = AutoModel.from_pretrained(weights_folder(weights))
    fingerprint = check_unchanged(weights, network.state_dict(), load_weights(weights))

    def features(pixels: Tensor) -> Tensor:
        output = network(pixel_values=pixels, output_hidden_states=block is not None)
        tokens = output.last_hidden_state if block is None else output.hidden_states[block]
        patch = network.config.patch_size
        rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        return tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))  # drops class and register tokens

    return network, features, fingerprint


for _name, _block, _note in (
    ("dinov2-small", 8, "Output of block 8: the last blocks of this copy look fine-tuned for saliency."),
    ("dinov2-small:final", None, "Final norm; one direction carries 41 % of within-image variance in this copy."),
):
    CATALOGUE.add(_name, VFMEntry(_name, "dinov2-small", partial(_vit, "dinov2-small", _block), 14, 384, *IMAGENET, (16, 16), _note))
