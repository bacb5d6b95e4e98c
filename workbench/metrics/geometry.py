"""The shape of a cloud of tokens."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import DataError
from workbench.metrics.neighbors import unit_rows

MASSIVE = (100.0, 1000.0)  # Sun et al. 2024: an activation above both, absolute and times the median magnitude


def mean_cosine(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """Mean cosine of two different tokens: 1 where all point one way (homogenised), 0 where they are orthogonal.

    All n (n - 1) pairs count, through the sum of the unit tokens, so no n x n matrix is formed.

    Raises:
        DataError: a single token, one that is all zeros, or a value that is not finite.
    """
    units = unit_rows(tokens, "the tokens").double()
    n = units.shape[-2]
    if n < 2:
        raise DataError("one token has no pair: expected at least 2")
    return (units.sum(-2).pow(2).sum(-1) - units.pow(2).sum((-2, -1))) / (n * (n - 1))


def effective_rank(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
    """exp of the entropy of the singular values divided by their sum (Roy & Vetterli 2007, "The effective rank"): 1 to
    min(n, d).

    The tokens are neither centred nor normalised, so a common offset or one token of great norm lowers it. Singular
    values are the roots of the eigenvalues of the smaller Gram matrix in float64: those below 1e-7 of the largest are
    lost in rounding and count as 0.

    Raises:
        DataError: all tokens are zero, or a value is not finite.
    """
    values = tokens.double()
    scale = values.abs().amax(dim=(-2, -1), keepdim=True)
    if not torch.isfinite(scale).all() or (scale == 0).any():
        raise DataError("tokens that are all zero or not finite have no rank: expected finite tokens")
    values = values / scale
    gram = values @ values.mT if values.shape[-2] <= values.shape[-1] else values.mT @ values
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    singular = torch.where(singular > 1e-7 * singular.amax(-1, keepdim=True), singular, 0.0)
    return torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()


def norm_ratios(tokens: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n"]:
    """Each token's norm over the median norm of its n: sink (high-norm) tokens stand out (Darcet et al. 2024).

    Raises:
        DataError: the median norm is 0.
    """
    norms = tokens.double().norm(dim=-1)
    middle = norms.quantile(0.5, dim=-1, keepdim=True)
    if not (middle > 0).all():
        raise DataError("half of the tokens are zero, so no norm is typical: expected tokens that are not zero")
    return norms / middle


def massive_tokens(tokens: Float[Tensor, "*batch n d"]) -> Bool[Tensor, "*batch n"]:
    """Tokens with a massive activation: above 100 and above 1000 times the median magnitude of the n tokens (Sun et al.
    2024)."""
    magnitude = tokens.abs().double()
    middle = torch.as_tensor(np.median(magnitude.flatten(-2).numpy(), axis=-1))  # torch's quantile refuses large inputs
    return (magnitude.amax(-1) > MASSIVE[0]) & (magnitude.amax(-1) > MASSIVE[1] * middle[..., None])


def similarity_to(tokens: Float[Tensor, "n d"], token: int) -> Float[Tensor, " n"]:
    """Cosine of every token with one of them, 1 at itself."""
    units = unit_rows(tokens, "the tokens").double()
    return units @ units[token]


def umap_map(tokens: Float[Tensor, "n d"], *, neighbors: int = 15, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Places of tokens on a plane by UMAP (McInnes et al. 2018) of their cosine distances; equal for equal tokens and
    seed.

    A picture to look at: distances between clusters, their sizes and densities mean nothing. The first call compiles
    for about 12 s.

    Raises:
        DataError: not more tokens than `neighbors`.
    """
    if len(tokens) <= neighbors:
        raise DataError(f"{len(tokens)} tokens with {neighbors} neighbours: expected more tokens than neighbours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap tells of one thread, which a seed needs, and of isolated points
        from umap import UMAP

        reducer = UMAP(n_neighbors=neighbors, metric="cosine", random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(unit_rows(tokens, "the tokens").float().numpy()), dtype=np.float64)


def joint_pca_rgb(maps: list[Float[Tensor, "layer token d"]]) -> list[np.ndarray]:
    """Colours of tokens by their first three principal components, in one basis for all maps given.

    Tokens are divided by the root mean square of their own map and layer, so that no layer dominates by its scale;
    components are centred on the median, divided by the interquartile range and squashed by tanh (the paper's figure of
    feature maps), over all maps together. Signs are fixed by the token that lies furthest out, so colours are
    reproducible and do not change when all maps are rotated together.

    Returns:
        For each map, (layer, token, 3) floats in 0..1; a two-dimensional map (token, d) counts as one layer.
    """
    scaled = [
        m / m.pow(2).mean(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-12)
        for m in (m.double().reshape(-1, *m.shape[-2:]) for m in maps)
    ]
    tokens = torch.cat([m.flatten(0, 1) for m in scaled])
    centre = tokens.mean(0)
    basis = torch.linalg.svd(tokens - centre, full_matrices=False).Vh[:3]
    projected = (tokens - centre) @ basis.T
    projected = projected * projected.gather(0, projected.abs().argmax(dim=0, keepdim=True)).sign()
    low, middle, high = torch.quantile(projected, torch.tensor([0.25, 0.5, 0.75], dtype=projected.dtype), dim=0)
    colours = (torch.tanh((projected - middle) / (high - low).clamp_min(1e-12)) + 1) / 2
    sizes = [m.shape[0] * m.shape[1] for m in scaled]
    return [part.reshape(*m.shape[:2], -1).numpy() for part, m in zip(colours.split(sizes), scaled, strict=True)]
