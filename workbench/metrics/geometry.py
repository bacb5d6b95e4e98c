"""The shape of a cloud of tokens."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def joint_pca_rgb(maps: list[Float[Tensor, "layer token d"]]) -> list[np.ndarray]:
    """Colours of tokens by their first three principal components, in one basis for all maps given.

    Tokens are divided by the root mean square of their own map and layer, so that no layer dominates by its scale; components are centred on the
    median, divided by the interquartile range and squashed by tanh (the paper's figure of feature maps), over all maps together. Signs are fixed,
    so colours are reproducible.

    Returns:
        For each map, (layer, token, 3) floats in 0..1; a two-dimensional map (token, d) counts as one layer.
    """
    scaled = [m / m.pow(2).mean(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-12) for m in (m.double().reshape(-1, *m.shape[-2:]) for m in maps)]
    tokens = torch.cat([m.flatten(0, 1) for m in scaled])
    centre = tokens.mean(0)
    basis = torch.linalg.svd(tokens - centre, full_matrices=False).Vh[:3]
    largest = basis.abs().argmax(dim=1, keepdim=True)
    basis = basis * basis.gather(1, largest).sign()
    projected = (tokens - centre) @ basis.T
    low, middle, high = torch.quantile(projected, torch.tensor([0.25, 0.5, 0.75], dtype=projected.dtype), dim=0)
    colours = (torch.tanh((projected - middle) / (high - low).clamp_min(1e-12)) + 1) / 2
    sizes = [m.shape[0] * m.shape[1] for m in scaled]
    return [part.reshape(*m.shape[:2], -1).numpy() for part, m in zip(colours.split(sizes), scaled, strict=True)]
