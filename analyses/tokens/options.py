"""Options and measures of the tokens analysis."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.analysis.declaration import DataOptions
from workbench.errors import ConfigError

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

    vfm: tuple[str, ...] = ("dinov2-small",)
    """Vision foundation models to measure beside the layers."""
    layers: tuple[int, ...] = ()
    """Layers of the model, 0 to L; all by default."""
    sink: float = 3.0
    """A token is a sink if its norm is above this multiple of the median norm of its image."""
    null: int = 20
    """Draws of isotropic random tokens."""
    maps: int = 4
    """Images whose tokens are stored for PCA and similarity maps; 0 for none."""
    map_megabytes: int = 256
    """Room for these maps, in MB; if not all layers fit, evenly spaced ones are stored, with the first and the last."""
    umap_images: int = 100
    """Images whose tokens are sampled for UMAP; 0 for none."""
    umap_tokens: int = 12
    """Tokens to sample from each of these images, half of them on objects where there are any."""
    umap_layers: tuple[int, ...] = ()
    """Layers in UMAP; by default the first, the middle and the last."""
    umap_neighbors: int = 15
    """Neighbors of each token in UMAP."""

    def __post_init__(self) -> None:
        for name, least in (
            ("null", 10),
            ("maps", 0),
            ("map_megabytes", 1),
            ("umap_images", 0),
            ("umap_tokens", 1),
            ("umap_neighbors", 2),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not self.sink > 1:
            raise ConfigError(f"sink is {self.sink}: expected a multiple of the median norm above 1")
