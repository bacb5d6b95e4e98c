"""Options and measures of the tokens analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from workbench.analysis.declaration import DataOptions

ENCODER = "tower"  # the model's own vision encoder, as tables and tensors call it
MEASURES = {
    "cosine": "mean cosine of two tokens of an image",
    "cosine_across": "mean cosine of tokens of two images",
    "effective_rank": "effective rank",
    "rank_share": "effective rank / min(n, d)",
    "norm": "median token norm",
    "norm_ratio": "largest / median norm",
    "sinks": "share of sink tokens",
    "massive": "share of tokens with a massive activation",
}
EDGES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Config(DataOptions):
    """What is measured, and which tokens are stored to look at."""

    ADDED: ClassVar[tuple[str, ...]] = ("final_norm",)

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to measure beside the layers; the model's own encoder (own) is measured in any case."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    final_norm: bool = False
    """Read the last layer after the language model's final norm, as transformers' `hidden_states[L]` is; by default
    before it, as the output of its block."""
    sink: Annotated[float, Gt(1)] = 3.0
    """A token is a sink if its norm is above this multiple of the median norm of its image."""
    null: Annotated[int, Ge(10)] = 20
    """Draws of isotropic random tokens."""
    maps: Annotated[int, Ge(0)] = 4
    """Images whose tokens are stored for PCA and similarity maps; 0 for none."""
    map_layer: Annotated[int | None, Ge(0)] = None
    """Layer of the PCA maps beside the answers; by default the middle one of those stored."""
    answer_tokens: Annotated[int, Ge(1)] = 32
    """Tokens of the answers beside these maps, at most."""
    map_megabytes: Annotated[int, Ge(1)] = 256
    """Room for these maps, in MB; if not all layers fit, evenly spaced ones are stored, with the first and the last."""
    umap_images: Annotated[int, Ge(0)] = 100
    """Images whose tokens are sampled for UMAP; 0 for none."""
    umap_tokens: Annotated[int, Ge(1)] = 12
    """Tokens to sample from each of these images, half of them on objects where there are any."""
    umap_layers: tuple[int, ...] = ()
    """Layers in UMAP; by default the first, the middle and the last."""
    umap_neighbors: Annotated[int, Ge(2)] = 15
    """Neighbors of each token in UMAP."""
